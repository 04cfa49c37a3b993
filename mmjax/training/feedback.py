"""What a run tells: progress on the terminal, `metrics.jsonl`, TensorBoard."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from mmjax.training.time_account import TimeAccount

CONSOLE = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line for the user, from the first process alone."""
    if jax.process_index() == 0:
        CONSOLE.print(message, markup=False, soft_wrap=True)


def data_progress(items: Iterable, total: int, title: str) -> Iterator:
    """Shows how far the preparation of data is."""
    if CONSOLE.is_terminal:
        return track(items, title, total, console=CONSOLE)
    CONSOLE.print(title, markup=False)
    return iter(items)


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard events, from the first process alone.

    A resumed run repeats the steps after its checkpoint: what was written for them is taken back.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _keep_until(path, resumed_step)
        self._file = path.open("a")
        self._folder, self._resumed_step, self._events = folder, resumed_step, None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line, and one TensorBoard scalar for each metric."""
        if not self._active:
            return
        if self._events is None:
            self._open_events()
        from tensorboardX.proto.summary_pb2 import Summary

        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._write_event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
        self._events.flush()

    def _open_events(self) -> None:
        """Not before the first step: tensorboardX imports PyTorch where that is installed, which takes seconds."""
        # Its writer of files alone: the one above it has a thread, whose errors nobody would catch.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._events = EventsWriter(str(self._folder / "events"))
        if self._resumed_step is not None:  # what was written of later steps no longer counts
            self._write_event(step=self._resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, **content) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), **content))

    def close(self) -> None:
        """Closes both; every line was flushed before."""
        if self._active:
            with contextlib.suppress(OSError):  # a full disk, which has been told
                self._file.close()
                if self._events:
                    self._events.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a line that a kill cut short is dropped."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _keep_until(path: Path, step: int | None) -> None:
    """Drops the lines after `step` (None: none of them), and those that a kill cut short."""
    kept = [line for line in read_metrics(path) if step is None or line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


class Meter:
    """Speed since the last reading: what `perf/` metrics report. It books its time on the run's account."""

    def __init__(self, account: TimeAccount, flops_per_example: int, peak_flops: float | None):
        self._account, self._flops_per_example, self._peak = account, flops_per_example, peak_flops
        self._first: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._steps = self._examples = 0
        self._spent = dict.fromkeys(("steps", "data_wait"), 0.0)

    def lap(self, kind: str) -> None:
        """Books the time since the last lap: a name in `time_account.KINDS`."""
        seconds = self._account.lap(kind)
        if kind in self._spent:
            self._spent[kind] += seconds

    def step(self, done: int, examples: int, first: bool) -> None:
        """Ends a step of so many examples; the first one of a session compiles."""
        seconds = self._account.lap("compile" if first else "steps", done)
        if first:
            self._first = {"perf/first_step_seconds": seconds}
            self._clear()
            return
        self._spent["steps"] += seconds
        self._steps += 1
        self._examples += examples

    def read(self) -> dict[str, float]:
        """The metrics since the last reading; starts anew. Without a step since then, no speed."""
        metrics, self._first = self._first | self._account.shares(), {}
        if not self._steps:
            return metrics
        elapsed = max(sum(self._spent.values()), 1e-9)
        rate = self._examples / elapsed
        metrics |= {
            "perf/examples_per_second": rate,
            "perf/step_seconds": elapsed / self._steps,
            "perf/data_wait_fraction": self._spent["data_wait"] / elapsed,
        }
        if self._peak:
            metrics["perf/mfu"] = rate * self._flops_per_example / (self._peak * jax.device_count())
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            metrics["perf/peak_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
        self._clear()
        return metrics


class TrainProgress:
    """The progress of training: a bar on a terminal, a line for each report elsewhere."""

    def __init__(self, start: int, steps: int):
        self._steps, self._begin, self._start = steps, time.perf_counter(), start
        self._bar = None
        if CONSOLE.is_terminal and jax.process_index() == 0:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=CONSOLE)
            self._task = self._bar.add_task("", total=steps, completed=start, text="compiling")

    def __enter__(self) -> "TrainProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics after `step` steps."""
        text = f"loss {metrics['train/loss']:.4f}"
        if "perf/first_step_seconds" in metrics:
            text += f" · first step in {metrics['perf/first_step_seconds']:.1f} s"
        if "perf/examples_per_second" in metrics:
            rate = metrics["perf/examples_per_second"]
            text += f" · {rate:,.0f} examples/s" if rate >= 10 else f" · {rate:.2g} examples/s"
            text += f" · data wait {metrics['perf/data_wait_fraction']:.1%}"
        if "perf/mfu" in metrics:
            text += f" · MFU {metrics['perf/mfu']:.1%}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
            return
        seconds = (time.perf_counter() - self._begin) / max(step - self._start, 1) * (self._steps - step)
        say(f"step {step}/{self._steps} · {text} · ETA {clock(seconds)}")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def show_evaluation(metrics: Mapping[str, float]) -> None:
    """Prints retrieval metrics as a table, a row for each evaluator and direction; the others below it."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    others: dict[str, float] = {}
    for name, value in metrics.items():
        _, evaluator, metric = name.split("/", 2)
        found = re.fullmatch("(text_to_image|image_to_text)(_reranked)?_(.+)", metric)
        if found:
            direction = found[1].replace("_", " ") + (", reranked" if found[2] else "")
            rows.setdefault((evaluator, direction), {})[found[3]] = value
        elif not re.fullmatch("(image|text)_retrieval_recall@5", metric):  # other names of R@5
            others[f"{evaluator}/{metric}"] = value
    table = Table(title="Retrieval on held-out data")
    for column in ("evaluator", "direction", "R@1", "R@5", "R@10", "mAP@10", "median rank"):
        table.add_column(column, justify="left" if column in ("evaluator", "direction") else "right")
    for (evaluator, direction), row in rows.items():
        shown = [f"{row[name]:.3f}" if name in row else "" for name in ("R@1", "R@5", "R@10", "mAP@10")]
        table.add_row(evaluator, direction, *shown, f"{row['median_rank']:g}")
    if jax.process_index() != 0:
        return
    if rows:
        Console(width=None if sys.stdout.isatty() else 100).print(table)
    for name, value in others.items():
        print(f"{name}: {value:.4g}")
