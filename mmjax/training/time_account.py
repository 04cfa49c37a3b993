"""Where a run's wall time goes, over all its sessions: its goodput."""

import contextlib
import json
import time
from pathlib import Path

import jax

from mmjax import runtime
from mmjax.files import write_atomically

FILE = "time.json"
# `start` is what precedes the first step of the first session; `restart` the same of the later ones, and the steps that
# they repeat because the checkpoint was older than the interruption.
KINDS = ("steps", "data_wait", "compile", "evaluation", "checkpoint", "start", "restart")


class TimeAccount:
    """Adds up seconds by kind; every moment since the process started belongs to one of KINDS.

    The sums of all sessions are kept in `time.json` in the workdir. The time between two sessions is not counted.
    """

    def __init__(self, workdir: Path, start: int):
        """Goes on with what earlier sessions left there; `start` is the step at which this one begins."""
        self._path = workdir / FILE
        try:
            saved = json.loads(self._path.read_text())
            self._seconds = {kind: float(saved["seconds"][kind]) for kind in KINDS}
            self._furthest = int(saved["step"])
        except (OSError, ValueError, KeyError):  # none, or a kill has cut it short
            self._seconds, self._furthest = dict.fromkeys(KINDS, 0.0), 0
        self._repeat_until = self._furthest
        self._resumed = start > 0 or self._furthest > 0
        self._last = time.perf_counter() - (time.time() - runtime.STARTED)
        self._step = start
        self.lap("start")

    def lap(self, kind: str, step: int | None = None) -> float:
        """Books the time since the last lap; returns its seconds.

        Args:
          kind: one of KINDS.
          step: how many steps are done by now, if that has changed.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        under_way = self._step + 1 if step is None else step
        self._step = self._step if step is None else step
        repeated = under_way <= self._repeat_until and kind in ("steps", "data_wait")
        again = repeated or (self._resumed and kind in ("start", "compile"))
        self._seconds["restart" if again else kind] += seconds
        return seconds

    def shares(self) -> dict[str, float]:
        """`goodput/<kind>`: the share of each in the wall time so far."""
        total = max(sum(self._seconds.values()), 1e-9)
        return {f"goodput/{kind}": seconds / total for kind, seconds in self._seconds.items()}

    def save(self) -> None:
        """Writes the sums, from the first process alone."""
        if jax.process_index() == 0:
            self._furthest = max(self._furthest, self._step)
            content = {"step": self._furthest, "seconds": {k: round(v, 3) for k, v in self._seconds.items()}}
            with contextlib.suppress(OSError):  # a full disk: no reason to end a run, nor to hide what does
                write_atomically(self._path, (json.dumps(content, indent=1) + "\n").encode())

    def summary(self) -> str:
        """One line for the end of a session."""
        seconds = sum(self._seconds.values())
        shares = sorted(self.shares().items(), key=lambda share: -share[1])
        parts = [f"{share:.1%} {name.partition('/')[2].replace('_', ' ')}" for name, share in shares if share >= 5e-4]
        return f"time: {seconds:,.0f} s of all sessions: {', '.join(parts)}"
