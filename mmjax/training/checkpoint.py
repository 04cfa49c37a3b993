"""Checkpoints: what a run needs to go on, and what its model needs to be used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from mmjax.config import to_plain
from mmjax.sharding.rules import parameter_shardings
from mmjax.training.state import TrainState, with_shardings

FOLDER = "checkpoints"
ITEMS = ("params", "opt_state", "ema", "config", "tokenizer", "data")


def saved_steps(workdir: str | Path) -> list[int]:
    """The steps that have a complete checkpoint in a workdir, ascending."""
    path = Path(workdir).absolute() / FOLDER
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


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
        if train.best_metric:
            # Without the metric a checkpoint is not a candidate; LatestN still keeps the new ones.
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
            best_fn=self._best_value if train.best_metric else None,  # without one, metrics are not saved
            best_mode=train.best_mode,
            create=not read_only,
            read_only=read_only,
        )
        path = Path(workdir).absolute() / FOLDER
        self._manager = ocp.CheckpointManager(path, options=options, item_names=ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        """Waits for what is being saved, and ends the background threads."""
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
        """
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "config": ocp.args.JsonSave(to_plain(self._config)),
            "tokenizer": ocp.args.JsonSave(dict(tokenizer)),
            "data": ocp.args.JsonSave({name: dict(parts) for name, parts in fingerprints.items()}),
        }
        if state.ema:
            items["ema"] = ocp.args.StandardSave(state.ema)
        kept = {self._best: float(metrics[self._best])} if self._best in metrics else None
        self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=kept)

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The state of a checkpoint, laid out like `target` (shapes with shardings)."""
        items = {
            "params": ocp.args.StandardRestore(target.params),
            "opt_state": ocp.args.StandardRestore(target.opt_state),
        }
        if target.ema:
            items["ema"] = ocp.args.StandardRestore(target.ema)
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        at = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), target.step.sharding)
        return TrainState(at, found["params"], found["opt_state"], found["ema"] if target.ema else {})

    def restore_params(self, step: int, shapes: PyTree, mesh: Mesh) -> PyTree:
        """The parameters to evaluate: their moving average where the run keeps one."""
        item = "ema" if self._config.train.ema_decay else "params"
        target = with_shardings(shapes, parameter_shardings(shapes, mesh))
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        return self._manager.restore(step, args=args)[item]

    def restore_tokenizer(self, step: int) -> dict[str, Any]:
        """What `Tokenizer.to_json()` gave."""
        return self._restore_json(step, "tokenizer")

    def restore_fingerprints(self, step: int) -> dict[str, dict[str, str]]:
        """The fingerprints of the data that the run reads, by stream and source."""
        return self._restore_json(step, "data")

    def _restore_json(self, step: int, item: str) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def wait(self) -> None:
        """Returns when everything that was started to be saved is on disk."""
        self._manager.wait_until_finished()
