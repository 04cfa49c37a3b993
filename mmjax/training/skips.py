"""What a run does about skipped steps: it goes on, goes back to a checkpoint, or stops and names the records."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmjax.data.pipeline import records_of_step
from mmjax.errors import UserError
from mmjax.files import write_atomically
from mmjax.training import feedback
from mmjax.training.checkpoint import Checkpoints, DamagedCheckpoint, agreed_steps
from mmjax.training.setup import Setup
from mmjax.training.state import TrainState

LAG = 2  # steps after which a step's metrics are read: the devices always have the next one to do


@dataclass(frozen=True)
class Fault:
    """So many steps in a row were skipped, up to step `last`."""

    last: int
    count: int


class SkipWatch:
    """Reads how many steps in a row were skipped, and acts when they are `health.max_skipped_in_a_row`."""

    def __init__(self, setup: Setup):
        self._setup, self._limits = setup, setup.config.health
        self._waiting: deque[tuple[int, Array]] = deque()

    def check(self, done: int, metrics: Mapping[str, Array], everything: bool) -> Fault | None:
        """Reads the metrics of the step before the last, or of all that were not read yet.

        Args:
          done: the step that `metrics` are of.
          metrics: of the training step, still on the devices.
          everything: whether to wait for the last step too.
        """
        self._waiting.append((done, metrics["train/skipped_in_a_row"]))
        while len(self._waiting) > (0 if everything else LAG):
            step, skipped = self._waiting.popleft()
            count = int(jax.device_get(skipped))
            if count >= self._limits.max_skipped_in_a_row:
                self._waiting.clear()
                return Fault(step, count)
        return None

    def go_back(self, fault: Fault, done: int, state: TrainState, checkpoints: Checkpoints) -> TrainState:
        """The state of the last checkpoint before the skipped steps, with which the run goes on after step `done`.

        `state` is deleted.

        Raises:
          UserError: `health.rollbacks` allows it no more, or there is no such checkpoint.
        """
        path = self._write_records(fault)
        what = (
            f"loss or gradient was not finite, or a spike, in {fault.count} steps in a row (up to step {fault.last}); "
            f"{path} names their records"
        )
        rolled_back, skipped = (int(value) for value in jax.device_get((state.health.rollbacks, state.health.skipped)))
        if rolled_back >= self._limits.rollbacks:
            raise UserError(
                f"{what}; allow more with config.health.max_skipped_in_a_row, go back to a checkpoint with "
                "config.health.rollbacks, or start anew with a lower config.optimizer.learning_rate"
            )
        checkpoints.wait()
        for array in jax.tree.leaves(state):
            array.delete()  # there may be no memory for both
        restored = self._restore_before(fault, checkpoints)
        if restored is None:
            raise UserError(f"{what}; there is no intact checkpoint from before them to go back to")
        step = int(jax.device_get(restored.step))
        feedback.say(f"{what}; going on from the parameters of step {step} with the data after step {done}")

        def placed(value: Array | int, like: Array) -> Array:
            return jax.device_put(jnp.asarray(value, jnp.int32), like.sharding)

        health = restored.health.replace(
            skipped=placed(skipped, restored.health.skipped),
            skipped_in_a_row=placed(0, restored.health.skipped_in_a_row),
            rollbacks=placed(rolled_back + 1, restored.health.rollbacks),
        )
        return restored.replace(step=placed(done, restored.step), health=health)

    def _restore_before(self, fault: Fault, checkpoints: Checkpoints) -> TrainState | None:
        """The newest intact checkpoint that the skipped steps are not in; None without one."""
        for step in reversed(agreed_steps(self._setup.workdir)):
            if step <= fault.last - fault.count:
                try:
                    return checkpoints.restore(step, self._setup.target)
                except DamagedCheckpoint as error:
                    feedback.say(str(error))
        return None

    def _write_records(self, fault: Fault) -> Path:
        setup, first = self._setup, fault.last - fault.count + 1
        path = setup.workdir / f"skipped_steps_{first:08d}_{fault.last:08d}.json"
        if jax.process_index() == 0:
            found = [records_of_step(setup.config, setup.sources, step) for step in range(first, fault.last + 1)]
            write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
        return path
