"""Reading what a run left in its workdir, whatever is missing or damaged there."""

import csv
import json
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mmjax.errors import UserError, one_line

_DRAWN = re.compile(r"(.+)-(\d{1,18})\.(png|csv)")  # what evaluators write: EVALUATOR-STEP.png, and .csv beside it
_DRAWN_IN = ("pictures", "eval/pictures")  # by the trainer, and by mmjax.evaluate
_LARGEST = 1e300  # differences of what is larger overflow


class Series(NamedTuple):
    """A metric over a run: its values, some of which may not be finite, by ascending step."""

    steps: Int[np.ndarray, " points"]
    values: Float[np.ndarray, " points"]

    def is_finite(self) -> Bool[np.ndarray, " points"]:
        """Which values can be drawn."""
        return np.abs(self.values) < _LARGEST

    def finite(self) -> "Series":
        """Without the values that cannot."""
        kept = self.is_finite()
        return Series(self.steps[kept], self.values[kept])


class Drawn(NamedTuple):
    """A file of an evaluator, of the last step that it has one of."""

    step: int
    path: Path


@dataclass
class Run:
    """What is in a workdir. What could not be read is empty, and told in `notes`, by the section that lacks it."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Series] = field(default_factory=dict)
    last_time: float | None = None  # of the last line of metrics, in seconds since 1970
    result: dict[str, Any] = field(default_factory=dict)
    time: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    pictures: dict[str, Drawn] = field(default_factory=dict)
    classes: dict[str, Drawn] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, section: str, text: str) -> None:
        """Tells a section of the page what is missing in it, or damaged."""
        self.notes.setdefault(section, []).append(text)

    def evaluator(self, name: str) -> dict[str, Any]:
        """An evaluator's entry in the config; {} where it has none."""
        entries = self.config.get("evaluators")
        entry = entries.get(name) if isinstance(entries, dict) else None
        return entry if isinstance(entry, dict) else {}

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max((int(series.steps[-1]) for series in self.metrics.values()), default=0)


def read_runs(workdirs: Sequence[Path]) -> list[Run]:
    """Reads runs, and names them by their folders: by as many of the last parts of their paths as tell them apart.

    Raises:
      UserError: a folder holds no run, or is named twice.
    """
    places = [path.resolve() for path in workdirs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"--workdir names {workdirs[number]} twice")
    parts = 1
    while len({place.parts[-parts:] for place in places}) < len(places):
        parts += 1
    return [read_run(path, "/".join(place.parts[-parts:])) for path, place in zip(workdirs, places, strict=True)]


def names_of(runs: Sequence[Run]) -> list[str]:
    """The metrics of any run, in the order in which they were first logged."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics))


def read_run(workdir: Path, name: str) -> Run:
    """Reads a run.

    Raises:
      UserError: the folder is not there, or holds no run.
    """
    if not any((workdir / file).is_file() for file in ("config.json", "metrics.jsonl")):
        raise UserError(f"{workdir} holds no run: neither config.json nor metrics.jsonl is there")
    run = Run(workdir, name)
    run.config = read_json(run, "config.json", "configuration")
    run.result = read_json(run, "result.json", "runs")
    run.time = read_json(run, "time.json", "speed")
    run.best = read_json(run, "eval/best.json", "runs")
    run.environment = read_json(run, "environment.json", "environment")
    run.checkpoints = sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())
    _read_metrics(run)
    run.pictures, run.classes = _drawn(workdir, "png"), _drawn(workdir, "csv")
    return run


def read_json(run: Run, file: str, section: str) -> dict[str, Any]:
    """The object in a file of the workdir; {} where there is none, noted where there is something else."""
    path = run.path / file
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
        run.note(section, f"{file} is damaged: it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        run.note(section, f"{file} is damaged: {one_line(error)}")
    return {}


def _read_metrics(run: Run) -> None:
    """Reads the trainer's metrics and those of the separate evaluation, which win where both know a step."""
    columns: dict[str, tuple[array, array]] = {}
    for file in ("metrics.jsonl", "eval/metrics.jsonl"):
        path = run.path / file
        if not path.is_file():
            continue
        faults = Counter()
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                _read_line(line, run, columns, faults)
        if faults["lines"]:
            run.note("curves", f"{file}: damaged lines left out: {faults['lines']:,} (a kill cuts the last one short)")
        if faults["values"]:
            run.note("curves", f"{file}: values left out that are no numbers: {faults['values']:,}")
    run.metrics = {name: _series(*both) for name, both in columns.items()}


def _read_line(line: str, run: Run, columns: dict[str, tuple[array, array]], faults: Counter) -> None:
    try:
        content = json.loads(line)
        step, when = content.pop("step"), content.pop("time", None)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        step = None
    if type(step) is not int or not 0 <= step < 2**53:
        faults["lines"] += 1
        return
    if isinstance(when, float):
        run.last_time = max(when, run.last_time or when)
    for name, value in content.items():
        if type(value) is not float and not (type(value) is int and abs(value) < 2**53):
            faults["values"] += 1
            continue
        if name not in columns:
            columns[name] = array("q"), array("d")
        steps, values = columns[name]
        steps.append(step)
        values.append(value)


def _series(steps: array, values: array) -> Series:
    """In the order of steps; of several values of a step the last one counts."""
    at, found = np.array(steps), np.array(values)
    order = np.argsort(at, kind="stable")
    at, found = at[order], found[order]
    last = np.append(np.diff(at) > 0, True)
    return Series(at[last], found[last])


def _drawn(workdir: Path, kind: str) -> dict[str, Drawn]:
    """Each evaluator's newest file of this kind."""
    found: dict[str, Drawn] = {}
    for folder in _DRAWN_IN:
        for path in sorted((workdir / folder).glob(f"*.{kind}")):
            match = _DRAWN.fullmatch(path.name)
            if match and (match[1] not in found or found[match[1]].step <= int(match[2])):
                found[match[1]] = Drawn(int(match[2]), path)
    return dict(sorted(found.items()))


def read_classes(run: Run, path: Path) -> list[tuple[str, int, float]]:
    """The rows of an evaluator's table of classes: the name, how many images it has, the share of them that is right.

    What cannot be read is noted.
    """
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, csv.Error) as error:
        run.note("classes", f"{path.name} cannot be read: {one_line(error)}")
        return []
    rows, damaged = [], 0
    for line in table:
        try:
            name, images, recall = line["class"] + "", int(line["images"]), float(line["recall"])
        except (KeyError, TypeError, ValueError):
            recall = float("nan")
        if 0 <= recall <= 1:
            rows.append((name, images, recall))
        else:
            damaged += 1
    if damaged or not table:
        run.note("classes", f"{path.name}: {f'damaged rows left out: {damaged:,}' if damaged else 'it has no rows'}")
    return rows
