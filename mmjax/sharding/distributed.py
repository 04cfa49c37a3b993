"""Processes: starting them, and moving data between their hosts and the mesh."""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int, PyTree


def initialize() -> None:
    """Joins the other processes of a run, where the environment says that there are others.

    It does on TPU pods, under SLURM, Open MPI, and wherever JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID are set. Call it before any other use of jax.
    """
    environment = os.environ
    if {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= environment.keys():
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            int(environment["JAX_NUM_PROCESSES"]),
            int(environment["JAX_PROCESS_ID"]),
        )
        return
    tpu_hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = max(int(environment.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if len(tpu_hosts) > 1 or tasks > 1 or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        jax.distributed.initialize()


def local_rows(sharding: NamedSharding, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that this process's devices hold, ascending, each once."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_devices(
    batch: Mapping[str, np.ndarray], rows: Int[np.ndarray, " rows"], sharding: NamedSharding, batch_size: int
) -> dict[str, jax.Array]:
    """Builds the global arrays of a batch from the rows that this process has loaded."""
    if len(rows) == batch_size:
        return jax.device_put(dict(batch), sharding)

    def build(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return values[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, shard)

    return {name: build(values) for name, values in batch.items()}


def prefetch(batches: Iterator[Any], ahead: int = 2) -> Iterator[Any]:
    """Draws `ahead` batches early, so that their transfer overlaps with the step before."""
    queue: deque[Any] = deque()
    for batch in batches:
        queue.append(batch)
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def replicated_to_host(tree: PyTree[jax.Array]) -> PyTree[np.ndarray]:
    """Copies fully replicated arrays to this host."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), tree)
