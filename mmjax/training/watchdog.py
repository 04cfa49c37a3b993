"""Ends a process that hangs: an aborted run is started again, a hanging one waits until somebody looks."""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import NoReturn

EXIT_HUNG = 75  # sysexits.h: a temporary failure, try again


class Watchdog:
    """While it is entered, the process has to call `beat` every so often; else its stacks are written and it exits.

    It catches what no heartbeat between processes does: one that lives but does not get on, and all those that wait
    for it inside a collective. The exit code is EXIT_HUNG; `hang.<process>.txt` in the workdir holds the Python stacks
    of all threads.
    """

    def __init__(self, workdir: Path, process: int, seconds: float):
        """`seconds` between two beats are too many; 0 turns the watchdog off."""
        self._path, self._seconds = workdir / f"hang.{process}.txt", seconds
        self._ended = threading.Event()
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()

    def beat(self) -> None:
        """Says that the process gets on."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 10, 10.0)):
            silence = time.monotonic() - self._last
            if silence > self._seconds:
                self._end(silence)

    def _end(self, silence: float) -> None:
        _exit_soon(EXIT_HUNG)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{datetime.now().isoformat(timespec='seconds')}: nothing for {silence:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"; where it hangs: {self._path}"
        except OSError as error:
            where = f"; its stacks could not be written: {error}"
        exit_at_once(
            EXIT_HUNG,
            f"error: nothing has happened for {silence:.0f} s (config.health.hang_timeout_seconds){where}; "
            "the same command goes on from the last checkpoint",
        )


def exit_at_once(code: int, message: str) -> NoReturn:
    """Ends the process and its loader processes, which may hang themselves, without waiting for anything."""
    _exit_soon(code)
    for child in multiprocessing.active_children():
        child.kill()
    os.write(sys.stderr.fileno(), f"{message}\n".encode())  # no lock: another thread may hold that of sys.stderr
    os._exit(code)


def _exit_soon(code: int) -> None:
    """Writing may hang too, where the file system or whoever reads the output is what does not answer."""
    timer = threading.Timer(30.0, os._exit, (code,))
    timer.daemon = True
    timer.start()
