"""The section of goodput and speed: where the wall time went, and how fast the steps were."""

from collections.abc import Sequence

import numpy as np

from mmjax.report.curves import plots
from mmjax.report.markup import Markup, join, row, table, tag
from mmjax.report.plot import stacked_bar
from mmjax.report.read import Run, names_of
from mmjax.report.section import Section, nothing, number, run_titles, section

_SPEED = {
    "perf/examples_per_second": ("examples a second, median", np.median),
    "perf/step_seconds": ("seconds a step, median", np.median),
    "perf/data_wait_fraction": ("share of a step waiting for data, median", np.median),
    "perf/mfu": ("model FLOP utilisation (MFU), median", np.median),
    "perf/peak_memory_gb": ("peak memory of a device, GB", np.max),
    "perf/first_step_seconds": ("first step with compilation, seconds, longest", np.max),
}


def speed(runs: Sequence[Run]) -> Section:
    """Shares of the wall time as bars, and what `perf/` metrics say."""
    seconds = [_seconds(run) for run in runs]
    known = [(title, found) for title, found in zip(run_titles(runs), seconds, strict=True) if found]
    bars = [join(tag("p", title, class_="barname"), _bar(found)) for title, found in known]
    time = join(bars, _time_table(runs, seconds)) if bars else nothing("There is no account of the wall time.")
    rows = [
        row(title, [_measured(run, name, measure) for run in runs])
        for name, (title, measure) in _SPEED.items()
        if any(name in run.metrics for run in runs)
    ]
    head = ["", *run_titles(runs)]
    speeds = table("Speed", head, rows, "numbers") if rows else nothing("No step's speed was measured.")
    names = [name for name in names_of(runs) if name.startswith("perf/") and name != "perf/first_step_seconds"]
    titles = tag("h3", "Wall time of all sessions"), tag("h3", "Speed")
    made = (titles[0], time, titles[1], speeds, plots(runs, "Speed over the steps", names))
    return section(runs, "speed", "Goodput and speed", *made)


def _measured(run: Run, name: str, measure) -> str:
    values = run.metrics[name].finite().values if name in run.metrics else ()
    return number(float(measure(values))) if len(values) else "–"


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of wall time by kind, from time.json; {} where it has none that add up."""
    found = run.time.get("seconds")
    found = found if isinstance(found, dict) else {}
    numbers = {kind: float(value) for kind, value in found.items() if type(value) in (int, float)}
    return numbers if 0 < sum(numbers.values()) < float("inf") and min(numbers.values()) >= 0 else {}


def _bar(seconds: dict[str, float]) -> Markup:
    shares = [(kind.replace("_", " "), value / sum(seconds.values())) for kind, value in seconds.items()]
    return stacked_bar("Wall time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares), shares)


def _time_table(runs: Sequence[Run], seconds: Sequence[dict[str, float]]) -> Markup:
    """The bars' legend, with the numbers."""
    rows = []
    for place, kind in enumerate(dict.fromkeys(kind for found in seconds for kind in found)):
        title = join(tag("span", class_=f"square k{place}"), " ", kind.replace("_", " "))
        rows.append(row(title, [_part(found, kind) for found in seconds]))
    rows.append(row("all", [f"{sum(found.values()):,.1f} s" if found else "–" for found in seconds], "total"))
    return table("Wall time by what it was spent on", ["", *run_titles(runs)], rows, "numbers")


def _part(seconds: dict[str, float], kind: str) -> str:
    return f"{seconds[kind]:,.1f} s · {seconds[kind] / sum(seconds.values()):.1%}" if kind in seconds else "–"
