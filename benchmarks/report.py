"""How a benchmark reports: a table for the reader, one flat JSON object for programs.

A metric is named `system/what_unit` or `task/system_over_peer`; its value is one number.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmjax.environment import machine_and_versions

PACKAGES = {
    "jax": "jax",
    "flax": "flax",
    "grain": "grain",
    "simplejpeg": "simplejpeg",
    "opencv": "opencv-python-headless",
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "transformers": "transformers",
    "tensorflow": "tensorflow",
}


def chosen(parser: argparse.ArgumentParser, kind: str, text: str, known: Collection[str]) -> list[str]:
    """The names in a comma-separated list; an unknown one ends the program as other wrong arguments do."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            parser.error(f'unknown {kind} "{name}"; known: {", ".join(known)}')
    return names


def installed(packages: Iterable[str], remedy: str) -> bool:
    """Whether all packages are there; if not, says which are missing, and the remedy."""
    missing = [package for package in dict.fromkeys(packages) if importlib.util.find_spec(package) is None]
    if missing:
        print(f"error: not installed: {', '.join(missing)}; {remedy}", file=sys.stderr)
    return not missing


def own_environment(root: Path) -> dict[str, str]:
    """The environment of another process of a benchmark, which finds the package where this one does."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def processor_seconds(pid: int | None = None) -> float:
    """What a process, by default this one, and those below it have used of the processors so far.

    Off Linux, that of this process alone.
    """
    total, waiting = (0.0, [pid]) if pid else (time.process_time(), _children(os.getpid()))
    while waiting:
        each = waiting.pop()
        try:
            after_name = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            waiting += _children(each)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        total += (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _children(pid: int | str) -> list[str]:
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def of_model(model: str, found: Mapping[str, float]) -> dict[str, float]:
    """Metrics under the name of a model: `mfu` of "B/16" is `B16/mfu`."""
    return {f"{model.replace('/', '')}/{name}": value for name, value in found.items()}


def print_table(metrics: Mapping[str, float], title: str | None = None) -> None:
    """Prints one row for each metric, in the given order; a line where the part before the "/" changes."""
    table = Table("metric", title=title)
    table.add_column("value", justify="right")
    group = None
    for name, value in metrics.items():
        if group not in (None, name.partition("/")[0]):
            table.add_section()
        group = name.partition("/")[0]
        table.add_row(name, _readable(value))
    Console(width=None if os.isatty(1) else 100).print(table)


def write_json(path: str | Path, metrics: Mapping[str, float]) -> None:
    """Writes {metric: number}, and under `environment` the machine and the versions.

    Folders that are missing are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**metrics, "environment": machine_and_versions(PACKAGES)}, indent=2) + "\n")


def _readable(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
