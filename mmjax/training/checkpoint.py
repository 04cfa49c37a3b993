"""Checkpoints: what a run needs to go on, and what its model needs to be used."""

import errno
import functools
import gc
import inspect
import json
import math
import os
import shutil
import sys
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, UInt32
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mmjax.config import to_plain
from mmjax.errors import UserError, one_line
from mmjax.files import write_atomically
from mmjax.sharding import distributed
from mmjax.sharding.rules import parameter_shardings, path_name
from mmjax.training.state import TrainState, with_shardings

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged_checkpoints"
BEST = "eval/best.json"  # written by the separate evaluation
ARRAYS = ("params", "opt_state", "ema", "health")
ITEMS = (*ARRAYS, "checksums", "config", "tokenizer", "data")

_NO_SPACE = ("No space left on device", "Disk quota exceeded")  # what tensorstore's texts end with


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read, or not as it was written."""


def saved_steps(workdir: str | Path) -> list[int]:
    """The steps that have a complete checkpoint in a workdir, ascending."""
    path = Path(workdir).absolute() / FOLDER
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def agreed_steps(workdir: str | Path) -> list[int]:
    """`saved_steps` as the first process sees them; all of them have to ask."""
    return distributed.from_first_process(saved_steps(workdir))


class Checkpoints:
    """`workdir/checkpoints/<step>/`, written in the background, each one whole or absent.

    Parameters, optimizer state and moving average are items of their own, so that a reader takes
    only what it uses. The latest `train.max_to_keep` are kept, and the best by `train.best_metric`.
    """

    def __init__(self, workdir: str | Path, config: ConfigDict, read_only: bool = False):
        self._config, self._best = config, config.train.best_metric
        self._worst = float("-inf" if config.train.best_mode == "max" else "inf")
        train = config.train
        policies = [LatestN(train.max_to_keep)]
        judged = train.best_metric and not read_only
        if judged:
            # Without the metric a checkpoint is not a candidate; LatestN still keeps the new ones.
            policies.append(_Marked(Path(workdir)))
            policies.append(
                BestN(
                    get_metric_fn=self._best_value,
                    reverse=train.best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=self._best_value if judged else None,  # without one, metrics are not saved
            best_mode=train.best_mode,
            create=not read_only,
            read_only=read_only,
            lightweight_initialize=read_only,  # a reader needs no metrics, and they may be damaged
            cleanup_tmp_directories=not read_only,  # of a save that was killed
        )
        self._path = Path(workdir).absolute() / FOLDER
        self._manager = ocp.CheckpointManager(self._path, options=options, item_names=ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        """Waits for what is being saved, and ends the background threads."""
        with self._space_needed():
            self._manager.close()

    def _best_value(self, metrics: Mapping[str, float]) -> float:
        return metrics.get(self._best, self._worst)

    def save(
        self,
        state: TrainState,
        tokenizer: Mapping[str, Any],
        fingerprints: Mapping[str, Mapping[str, str]],
        metrics: Mapping[str, float],
    ) -> None:
        """Starts to save the state; training goes on meanwhile.

        Args:
          state: what to save; its `step` names the checkpoint.
          tokenizer: `Tokenizer.to_json()`.
          fingerprints: of the data, by stream and source.
          metrics: the evaluation at this step, for `train.best_metric`.

        Raises:
          UserError: there is no space for this one, or there was none for the one before.
        """
        arrays = {name: value for name in ARRAYS if jax.tree.leaves(value := getattr(state, name))}
        items = {name: ocp.args.StandardSave(value) for name, value in arrays.items()} | {
            "checksums": ocp.args.JsonSave({name: checksums(value) for name, value in arrays.items()}),
            "config": ocp.args.JsonSave(to_plain(self._config)),
            "tokenizer": ocp.args.JsonSave(dict(tokenizer)),
            "data": ocp.args.JsonSave({name: dict(parts) for name, parts in fingerprints.items()}),
        }
        kept = {self._best: float(metrics[self._best])} if self._best in metrics else None
        with self._space_needed():
            self._manager.wait_until_finished()  # of the one before, which may still take space
            if distributed.any_process(shutil.disk_usage(self._path).free < space(arrays)):
                raise OSError(errno.ENOSPC, _NO_SPACE[0])
            self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=kept)

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The state of a checkpoint, laid out like `target` (shapes with shardings).

        Raises:
          DamagedCheckpoint: it cannot be read, or is not what was written.
          UserError: it holds other arrays.
        """
        wanted = {name: value for name in ARRAYS if jax.tree.leaves(value := getattr(target, name))}
        found = self._restore_arrays(step, wanted)
        at = jax.device_put(jnp.asarray(step, jnp.int32), target.step.sharding)
        return target.replace(step=at, **found)

    def restore_params(self, step: int, shapes: PyTree, mesh: Mesh) -> PyTree:
        """The parameters to evaluate: their moving average where the run keeps one.

        Raises:
          DamagedCheckpoint: they cannot be read, or are not what was written.
          UserError: they are other arrays.
        """
        item = "ema" if self._config.train.ema_decay else "params"
        with jax.set_mesh(mesh):
            return self._restore_arrays(step, {item: with_shardings(shapes, parameter_shardings(shapes, mesh))})[item]

    def _restore_arrays(self, step: int, targets: Mapping[str, PyTree]) -> dict[str, PyTree]:
        written, found, fault = {}, {}, None
        with _leftovers_dropped():
            try:
                with self._damage_told(step):
                    written = self._read_json(step, "checksums")
                    self._check_arrays(step, targets, written)
                    for name, target in targets.items():
                        # Not through the manager: a process that fails would not come to the barrier at its end.
                        folder = epath.Path(self._path / str(step) / name)
                        found[name] = _reader().restore(folder, args=ocp.args.StandardRestore(target))
            except DamagedCheckpoint as error:
                fault = DamagedCheckpoint(str(error))  # what it came from would keep what was being read
                fault.add_note(traceback.format_exc())
            if fault:
                gc.collect()  # some are in cycles
        # Each process reads its own part; the checksums are computed by all together.
        if distributed.any_process(fault is not None):
            raise fault or DamagedCheckpoint(f"checkpoint {self._path / str(step)} is damaged for another process")
        with self._damage_told(step):
            for name in targets:
                if checksums(found[name]) != written[name]:
                    raise ValueError(f"the values of {name} are not those that were saved")
        return found

    def _check_arrays(self, step: int, targets: Mapping[str, PyTree], written: Mapping[str, Mapping[str, int]]) -> None:
        for name, target in targets.items():
            different = written.get(name, {}).keys() ^ {array for array, _ in _arrays(target)}
            if different:
                raise UserError(
                    f"checkpoint {self._path / str(step)} is of another model, or of another version of mmjax: its "
                    f"{name} and those wanted differ in {min(different)}"
                )

    def restore_tokenizer(self, step: int) -> dict[str, Any]:
        """What `Tokenizer.to_json()` gave."""
        return self._restore_json(step, "tokenizer")

    def restore_fingerprints(self, step: int) -> dict[str, dict[str, str]]:
        """The fingerprints of the data that the run reads, by stream and source."""
        return self._restore_json(step, "data")

    def _restore_json(self, step: int, item: str) -> dict[str, Any]:
        with self._damage_told(step):
            return self._read_json(step, item)

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        return ocp.JsonCheckpointHandler().restore(epath.Path(self._path / str(step) / item))

    def wait(self) -> None:
        """Returns when everything that was started to be saved is on disk.

        Raises:
          UserError: there is no space for it.
        """
        with self._space_needed():
            self._manager.wait_until_finished()

    @contextmanager
    def _damage_told(self, step: int) -> Iterator[None]:
        """Of the kinds of errors that damaged files lead to there is no list; lack of memory is none of them."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError | UserError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise DamagedCheckpoint(f"checkpoint {self._path / str(step)} is damaged: {one_line(error)}") from error

    @contextmanager
    def _space_needed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not any(text in str(error) for text in _NO_SPACE):
                raise
            last = max(saved_steps(self._path.parent), default=None)
            goes_on = "none is there yet" if last is None else f"the last good one is of step {last}"
            raise UserError(
                f"no space left in {self._path} for a checkpoint; {goes_on}; free some space, and the same command "
                "goes on from there"
            ) from error


class _Marked:
    """Keeps the checkpoint that the separate evaluation found best."""

    def __init__(self, workdir: Path):
        self._path = workdir / BEST

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        try:
            best = json.loads(self._path.read_text())["step"]
        except (OSError, ValueError, KeyError, TypeError):
            best = None
        return [info.step == best for info in checkpoints]


def mark_best(workdir: Path, config: ConfigDict, lines: Iterable[Mapping[str, float]]) -> None:
    """Tells a trainer which of its checkpoints is the best by `train.best_metric`, where that is set.

    Args:
      workdir: the run's.
      config: the run's.
      lines: the metrics that the separate evaluation has found, each with its `step`.
    """
    metric, there = config.train.best_metric, saved_steps(workdir)
    # Of several lines of a step the last one counts.
    found = {line["step"]: line[metric] for line in lines if metric in line and line["step"] in there}
    if found := {step: value for step, value in found.items() if not math.isnan(value)}:
        step = (max if config.train.best_mode == "max" else min)(found, key=found.__getitem__)
        content = {"step": step, metric: found[step]}
        (workdir / BEST).parent.mkdir(exist_ok=True)
        write_atomically(workdir / BEST, (json.dumps(content) + "\n").encode())


@contextmanager
def _leftovers_dropped() -> Iterator[None]:
    """Where one of orbax's reads fails, the others are dropped as they are: without this, each prints a traceback."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda fault: None if inspect.iscoroutine(fault.object) else hook(fault)
    try:
        yield
    finally:
        sys.unraisablehook = hook


@functools.cache
def _reader() -> ocp.StandardCheckpointHandler:
    return ocp.StandardCheckpointHandler()


def space(tree: PyTree) -> int:
    """Bytes that a checkpoint of these arrays (or shapes) takes on disk, at most; files take whole blocks."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 2**20


def checksums(tree: PyTree) -> dict[str, int]:
    """A number for each array that changes with any of its bits; the same on every mesh."""
    arrays = _arrays(tree)
    values = np.asarray(_checksums([array for _, array in arrays]).addressable_data(0))
    return {name: int(value) for (name, _), value in zip(arrays, values, strict=True)}


def _arrays(tree: PyTree) -> list[tuple[str, Array]]:
    """The leaves (arrays or shapes) with their names: path, type and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(f"{path_name(path)} {leaf.dtype}{list(leaf.shape)}", leaf) for path, leaf in leaves]


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, " leaves"]:
    # Sums modulo 2^32 do not depend on their order; odd weights make them depend on every element's place.
    def checksum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, length in enumerate(leaf.shape):
            place = place * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

    sums = jnp.stack([checksum(leaf) for leaf in leaves])
    mesh = jax.sharding.get_abstract_mesh()
    return sums if mesh.empty else jax.lax.with_sharding_constraint(sums, P())


def steps_with_damaged_metrics(workdir: str | Path) -> list[int]:
    """The checkpoints whose evaluation, which is read to keep the best, cannot be read by the first process."""
    damaged = []
    for step in saved_steps(workdir) if jax.process_index() == 0 else ():
        path = Path(workdir) / FOLDER / str(step) / "metrics" / "metrics"
        try:
            if path.exists():
                json.loads(path.read_text())
        except ValueError:
            damaged.append(step)
    return distributed.from_first_process(damaged)


def set_aside(workdir: str | Path, step: int) -> Path:
    """Moves a damaged checkpoint out of the way, from the first process alone; returns its new place."""
    workdir = Path(workdir)
    target = workdir / DAMAGED_FOLDER / str(step)
    if jax.process_index() == 0:
        if target.exists():
            target = target.with_name(f"{step}.{uuid.uuid4().hex[:8]}")
        target.parent.mkdir(exist_ok=True)
        os.replace(workdir / FOLDER / str(step), target)
    multihost_utils.sync_global_devices("set aside")
    return target
