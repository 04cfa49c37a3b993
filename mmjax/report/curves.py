"""The sections of curves: losses, metrics, and where the time went."""

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mmjax.report.markup import Markup, details, join, row, table, tag
from mmjax.report.plot import Line, is_log, line_plot, stacked_bar, swatch
from mmjax.report.read import Run, Series
from mmjax.report.results import arrow, is_alias
from mmjax.report.section import Section, nothing, number, run_titles, section

FIRST_SHOWN = 6  # of a group of plots; the others are shown on demand
_LOG = re.compile(r"loss|grad_norm|perplexity|rank")
_CUMULATIVE = ("goodput/", "perf/first_step_seconds")  # said by the tables of the section on speed
_SPEED = {
    "perf/examples_per_second": ("examples a second, median", np.median),
    "perf/step_seconds": ("seconds a step, median", np.median),
    "perf/data_wait_fraction": ("waiting for data, median share", np.median),
    "perf/mfu": ("model FLOP utilisation (MFU), median", np.median),
    "perf/peak_memory_gb": ("peak memory of a device, GB", np.max),
    "perf/first_step_seconds": ("first step with compilation, seconds, latest session", lambda values: values[-1]),
}


def losses_and_metrics(runs: Sequence[Run]) -> Section:
    """Plots of what the trainer and evaluators reported over the steps."""
    names = _names(runs, lambda name: not name.startswith(("perf/", *_CUMULATIVE)) and not is_alias(name))
    evaluators = dict.fromkeys(name.split("/")[1] for name in names if name.startswith("eval/"))
    groups = [
        ("Losses", sorted(filter(_is_loss, names), key=lambda name: name != "train/loss")),
        ("Other metrics of training", sorted((n for n in names if n.startswith("train/") and not _is_loss(n)), key=_weight)),
        *(
            (f"Evaluator {name}", [metric for metric in names if metric.startswith(f"eval/{name}/")])
            for name in evaluators
        ),
        ("Others", [name for name in names if not name.startswith(("train/", "eval/"))]),
    ]
    made = [_group(runs, title, metrics) for title, metrics in groups if metrics]
    hint = "Point at a plot, or choose it and use the arrow keys, to read values at a step."
    content = join(tag("p", hint, class_="hint"), made) if made else nothing("No metrics were logged.")
    return section(runs, "curves", "Losses and metrics", content)


def speed(runs: Sequence[Run]) -> Section:
    """Where the wall time went, and how fast the steps were."""
    shares = [_seconds(run) for run in runs]
    bars = [
        join(tag("p", run_title, class_="barname"), stacked_bar(_bar_label(run, parts), _shares(parts)))
        for run, run_title, parts in zip(runs, run_titles(runs), shares, strict=True)
        if parts
    ]
    time = join(bars, _time_table(runs, shares)) if bars else nothing("There is no account of the wall time.")
    rows = [
        row(title, [_measured(run, name, measure) for run in runs])
        for name, (title, measure) in _SPEED.items()
        if any(name in run.metrics for run in runs)
    ]
    speeds = (
        table("Speed", ["", *run_titles(runs)], rows, "numbers") if rows else nothing("No step's speed was measured.")
    )
    names = _names(runs, lambda name: name.startswith("perf/") and name not in _CUMULATIVE)
    plots = _group(runs, "Speed over the steps", names) if names else None
    return section(
        runs, "speed", "Goodput and speed", tag("h3", "Wall time of all sessions"), time, tag("h3", "Speed"), speeds, plots
    )


def _names(runs: Sequence[Run], wanted: Callable[[str], bool]) -> list[str]:
    """The metrics of any run, in the order in which they were first logged."""
    return [name for name in dict.fromkeys(name for run in runs for name in run.metrics) if wanted(name)]


def _is_loss(name: str) -> bool:
    return name.startswith("train/") and name.endswith("loss")


def _weight(name: str) -> int:
    """What a reader looks for first comes first."""
    if name in ("train/grad_norm", "train/learning_rate"):
        return 0
    return 1 if name.endswith("accuracy") else 2


def _group(runs: Sequence[Run], title: str, names: Sequence[str]) -> Markup:
    """Plots of metrics that changed; the others in a sentence."""
    lines = {name: _lines(runs, name) for name in names}
    constant = {name: _constant(found) for name, found in lines.items()}
    once = [n for n in names if constant[n] is None and all(len(line.series.steps) == 1 for line in lines[n])]
    plotted = [_figure(name, lines[name]) for name in names if constant[name] is None and name not in once]
    told = [f"{name.partition('/')[2]} = {number(value)}" for name, value in constant.items() if value is not None]
    hidden = plotted[FIRST_SHOWN:]
    return join(
        tag("h3", title),
        tag("div", plotted[:FIRST_SHOWN], class_="plots") if plotted else None,
        details(f"{len(hidden)} more plots", tag("div", hidden, class_="plots")) if hidden else None,
        tag("p", f"The same at every step: {', '.join(told)}.", class_="hint") if told else None,
        tag("p", f"Logged once, so without a curve: {len(once)} metrics.", class_="hint") if once else None,
    )


def _lines(runs: Sequence[Run], name: str) -> list[Line]:
    return [Line(place, run.name, run.metrics[name]) for place, run in enumerate(runs) if name in run.metrics]


def _constant(lines: Sequence[Line]) -> float | None:
    """The one value that all runs have at all of several steps."""
    values = np.concatenate([line.series.values for line in lines])
    same = (values == values[0]).all() and any(len(line.series.steps) > 1 for line in lines)
    return float(values[0]) if same else None


def _figure(name: str, lines: Sequence[Line]) -> Markup:
    may_be_log = bool(_LOG.search(name))
    short = name.split("/", 2 if name.startswith("eval/") else 1)[-1]
    label = f"{name} over steps. " + " ".join(_in_words(line) for line in lines)
    legend = [
        tag("li", swatch(line.number), tag("span", line.name, class_="run"), " ", _last(line)) for line in lines
    ]
    broken = [line for line in lines if not line.series.is_finite().all()]
    return tag(
        "figure",
        tag("figcaption", tag("strong", short), arrow(name), tag("span", class_="at")),
        line_plot(label, lines, may_be_log),
        tag("ul", legend, class_="legend"),
        [tag("p", _not_finite(line), class_="note") for line in broken],
        class_="plotted",
    )


def _last(line: Line) -> Markup:
    value = number(float(line.series.values[-1]))
    return tag("span", value, class_="value", data_run=line.number, data_last=value)


def _in_words(line: Line) -> str:
    series = line.series
    values, steps = series.values, series.steps
    return (
        f"{line.name}: {number(float(values[0]))} at step {steps[0]:,}, {number(float(values[-1]))} at step {steps[-1]:,}, "
        f"{len(steps):,} points."
    )


def _not_finite(line: Line) -> str:
    wrong = ~line.series.is_finite()
    return f"{line.name}: {wrong.sum():,} values are not finite, the first at step {line.series.steps[wrong][0]:,}."


def _measured(run: Run, name: str, measure: Callable[[np.ndarray], float]) -> str:
    values = run.metrics[name].finite().values if name in run.metrics else ()
    return number(float(measure(values))) if len(values) else "–"


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of wall time by kind: of time.json, or else the last shares that were logged."""
    found = run.time.get("seconds")
    if not isinstance(found, dict):
        found = {
            name.removeprefix("goodput/"): float(series.values[-1])
            for name, series in run.metrics.items()
            if name.startswith("goodput/")
        }
        if found:
            run.note("speed", "time.json cannot be used: shares of the last line of metrics, not seconds")
    numbers = {str(kind): float(value) for kind, value in found.items() if isinstance(value, int | float)}
    return numbers if 0 < sum(numbers.values()) < float("inf") and min(numbers.values()) >= 0 else {}


def _shares(seconds: dict[str, float]) -> list[tuple[str, float]]:
    total = sum(seconds.values())
    return [(_readable(kind), value / total) for kind, value in seconds.items()]


def _readable(kind: str) -> str:
    return kind.replace("_", " ")


def _bar_label(run: Run, seconds: dict[str, float]) -> str:
    return f"Wall time of {run.name}: " + ", ".join(f"{name} {share:.1%}" for name, share in _shares(seconds))


def _time_table(runs: Sequence[Run], seconds: Sequence[dict[str, float]]) -> Markup:
    kinds = list(dict.fromkeys(kind for found in seconds for kind in found))
    rows = [
        row(join(tag("span", class_=f"square k{place}"), " ", _readable(kind)), [_part(s, kind) for s in seconds])
        for place, kind in enumerate(kinds)
    ]
    rows.append(row("all", [f"{sum(s.values()):,.1f} s" if s else "–" for s in seconds], "total"))
    return table("Wall time by what it was spent on", ["", *run_titles(runs)], rows, "numbers")


def _part(seconds: dict[str, float], kind: str) -> str:
    if kind not in seconds:
        return "–"
    return f"{seconds[kind]:,.1f} s · {seconds[kind] / sum(seconds.values()):.1%}"
