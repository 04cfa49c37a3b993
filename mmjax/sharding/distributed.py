"""Processes: starting them, and moving data between their hosts and the mesh."""

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Int, PyTree

from mmjax.errors import UserError

SHUTDOWN_SECONDS = 60  # that a process waits at its end for the others


def initialize(options: Mapping[str, Any]) -> None:
    """Joins the other processes of a run, where the config or the environment says that there are others.

    The environment does on TPU pods, under SLURM and Open MPI, in an indexed Kubernetes job, and wherever
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set. Call it before any other use of jax.

    Args:
      options: `config.distributed`; what is set there goes before the environment.

    Raises:
      UserError: only a part of what is needed is set.
    """
    environment = os.environ
    given = {
        "coordinator_address": options["coordinator_address"] or environment.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": options["num_processes"] or _number(environment, "JAX_NUM_PROCESSES"),
        "process_id": _number(environment, "JAX_PROCESS_ID") if options["process_id"] < 0 else options["process_id"],
    }
    timeouts = {
        "heartbeat_timeout_seconds": options["heartbeat_timeout_seconds"],
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        jax.distributed.initialize(**given, **timeouts)
    elif given["coordinator_address"] or given["num_processes"]:
        names = " and ".join(f"config.distributed.{name} (or JAX_{name.upper()})" for name in missing)
        raise UserError(f"several processes are to train together: set {names}")
    elif _in_a_cluster(environment):
        jax.distributed.initialize(**timeouts)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # jax writes what the first process compiles, under a name that on CPUs no other process finds. A second start
        # would let the first one wait for what the others compile; Gloo, which connects them, gives up after 30 s.
        jax.config.update("jax_enable_compilation_cache", False)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environment[name]) if name in environment else None
    except ValueError:
        raise UserError(f"{name}={environment[name]} is no whole number") from None


def _in_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax will find other processes by itself."""
    tpu_hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = [_number(environment, name) or 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    in_kubernetes_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    several_slices = bool(environment.get("MEGASCALE_COORDINATOR_ADDRESS"))
    return len(tpu_hosts) > 1 or max(tasks) > 1 or several_slices or in_kubernetes_job


def any_process(value: bool) -> bool:
    """Whether it is true in any process; all of them have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.bool_(value)).any())


def from_first_process(value: Any) -> Any:
    """What the first process has in place of `value`, which JSON can hold; all of them have to ask.

    For what each could look up itself, but file systems may show late: what follows from it has to be the same.
    """
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return json.loads(array_from_first_process(np.resize(content, length)).tobytes())  # only the first one's counts


def array_from_first_process(array: np.ndarray) -> np.ndarray:
    """The first process's array; all of them have to ask, with one of the same shape and type.

    For what each has computed on its host, where the last bit may differ, if the devices' next work depends on it.
    """
    if jax.process_count() == 1:
        return array
    content = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(content)).astype(np.uint8)
    return np.frombuffer(sent.tobytes(), array.dtype).reshape(array.shape)


def local_rows(sharding: NamedSharding, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that this process's devices hold, ascending, each once."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_devices(
    batch: Mapping[str, PyTree[np.ndarray]], rows: Int[np.ndarray, " rows"], sharding: NamedSharding, batch_size: int
) -> dict[str, PyTree[jax.Array]]:
    """Builds the global arrays of a batch from the rows that this process has loaded."""
    if len(rows) == batch_size:
        return jax.device_put(dict(batch), sharding)

    def build(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return values[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)

    return jax.tree.map(build, dict(batch))


def prefetch(batches: Iterator[Any], ahead: int = 2, lead: int = 0) -> Iterator[Any]:
    """Draws up to `ahead` batches early, so that their transfer overlaps with the step before.

    The first waits for `lead` others, by default for none; the lead grows by one with each batch.
    """
    queue: deque[Any] = deque()
    for batch in batches:
        queue.append(batch)
        if len(queue) > lead:
            yield queue.popleft()
            lead = min(lead + 1, ahead)
    yield from queue


def replicated_to_host(tree: PyTree[jax.Array]) -> PyTree[np.ndarray]:
    """Copies fully replicated arrays to this host."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), tree)
