"""What a run does about data that cannot be read: counts it, notes it, and stops past a limit."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmjax.errors import UserError

MOST_NOTED = 10_000  # different records; what comes after is only counted
FEW = 200  # the share is of at least so many records: one broken record among the first is no verdict


class BrokenRecords:
    """The records that were replaced by others since the start of this process.

    Each process notes its own in `broken_records.<process>.jsonl`, once for each stream and message, the first
    MOST_NOTED of them.
    """

    def __init__(self, workdir: Path, limit: float):
        """Notes into `workdir`; `limit` is the largest share of unreadable records, `loader.max_broken_fraction`."""
        self._path = workdir / f"broken_records.{jax.process_index()}.jsonl"
        self._limit = limit
        self._read, self._broken = Counter(), Counter()
        self._known: dict[tuple[str, str], None] = {}

    def note(self, stream: str, messages: Sequence[str], rows: int) -> None:
        """Counts the unreadable records of one batch of `rows` rows, which were replaced."""
        self._read[stream] += rows + len(messages)
        self._broken[stream] += len(messages)
        new = dict.fromkeys((stream, message) for message in messages if (stream, message) not in self._known)
        if new and len(self._known) < MOST_NOTED:
            self._known.update(new)
            with self._path.open("a") as file:
                for stream_name, message in new:
                    file.write(json.dumps({"stream": stream_name, "error": message}) + "\n")

    def check(self, streams: Sequence[str]) -> dict[str, float]:
        """The metrics of all processes together; they have to call it at the same step.

        Returns:
          `data/<stream>_replaced_records` for each stream that had any.

        Raises:
          UserError: more than the limit of a stream's records cannot be read.
        """
        counts = np.array([[self._broken[name], self._read[name]] for name in streams], np.int64)
        if jax.process_count() > 1:
            counts = multihost_utils.process_allgather(counts).sum(axis=0)
        for name, (broken, read) in zip(streams, counts.tolist(), strict=True):
            if broken > self._limit * max(read, FEW):
                example = next((message for stream, message in self._known if stream == name), "in another process")
                raise UserError(
                    f"stream {name}: {broken:,} of {read:,} records cannot be read, more than "
                    f"config.loader.max_broken_fraction {self._limit:g} allows; {self._path} names them; {example}"
                )
        return {
            f"data/{name}_replaced_records": float(broken)
            for name, (broken, _) in zip(streams, counts.tolist(), strict=True)
            if broken
        }

    def summary(self) -> str:
        """One line for the end of the run; empty where every record could be read."""
        broken, read = sum(self._broken.values()), sum(self._read.values())
        if not broken:
            return ""
        return (
            f"{broken:,} of {read:,} records could not be read and were replaced ({broken / read:.2%}), "
            f"{len(self._known):,} of them noted: {self._path}"
        )
