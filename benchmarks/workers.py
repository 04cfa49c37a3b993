"""Processes that each hold one of the systems compared, and take turns."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.5  # seconds


class Ended(Exception):
    """A worker has ended: its exit code, and what it wrote to standard error."""

    def __init__(self, code: int, errors: str):
        super().__init__(f"exit code {code}\n{errors}")
        self.last_line = f"{errors.rpartition(chr(10))[2]} (exit code {code})".strip()


class Worker:
    """A process of a benchmark. It answers each line with one JSON object, and once by itself: it is warm."""

    def __init__(self, program: str, arguments: Sequence[str]):
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Otherwise jax ends each of its errors with a line about tracebacks.
            env=report.own_environment(ROOT) | {"JAX_TRACEBACK_FILTERING": "off"},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()  # closes its input, and waits for its end
        self._errors.close()

    def answer(self) -> dict[str, float]:
        """What it answers next.

        Raises:
          Ended: nothing, as it has ended.
        """
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise Ended(code, self._errors.read().strip())
        return json.loads(line)

    def ask(self, text: str) -> dict[str, float]:
        """What it answers to this. Threads of another system that worked just now may spin a while: it waits for them.

        Raises:
          Ended: it has ended.
        """
        time.sleep(PAUSE)
        try:
            self._process.stdin.write(f"{text}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.answer()


def rotated(systems: Sequence[str], number: int) -> list[str]:
    """The systems in the order of a round: each round begins with another one."""
    first = number % max(len(systems), 1)
    return [*systems[first:], *systems[:first]]
