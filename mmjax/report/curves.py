"""The section of losses and metrics over the steps."""

import re
from collections.abc import Sequence

import numpy as np

from mmjax.report.markup import Markup, details, join, tag
from mmjax.report.plot import Line, line_plot, swatch
from mmjax.report.read import Run, names_of
from mmjax.report.results import arrow, is_alias
from mmjax.report.section import Section, nothing, number, section

FIRST_SHOWN = 6  # of a group of plots; the others are shown on demand
_LOG = re.compile(r"loss|grad_norm|perplexity|rank")


def losses_and_metrics(runs: Sequence[Run]) -> Section:
    """Plots of what the trainer and the evaluators reported."""
    names = [name for name in names_of(runs) if not name.startswith(("perf/", "goodput/")) and not is_alias(name)]
    groups = {"Losses": sorted(filter(_is_loss, names), key=lambda name: name != "train/loss")}
    groups["Other metrics of training"] = [n for n in names if n.startswith("train/") and not _is_loss(n)]
    for name in names:
        if not name.startswith("train/"):
            parts = name.split("/")
            title = f"Evaluator {parts[1]}" if parts[0] == "eval" and len(parts) > 2 else "Others"
            groups.setdefault(title, []).append(name)
    made = join(plots(runs, title, metrics) for title, metrics in groups.items())
    hint = "Point at a plot to read its values at a step. What was reported of one step alone has no curve."
    content = tag("p", hint, class_="hint") if names else nothing("No metrics were logged.")
    return section(runs, "curves", "Losses and metrics", content, made)


def plots(runs: Sequence[Run], title: str, names: Sequence[str]) -> Markup | None:
    """Plots of metrics that changed, the others in a sentence; None where all are of one step alone."""
    drawn, constant = [], []
    for name in names:
        lines = [Line(place, run.name, run.metrics[name]) for place, run in enumerate(runs) if name in run.metrics]
        values = np.concatenate([line.series.values for line in lines])
        if all(len(line.series.steps) == 1 for line in lines):
            continue
        if (values == values[0]).all():
            constant.append(f"{_short(name)} = {number(float(values[0]))}")
        else:
            drawn.append(_figure(name, lines))
    hidden = drawn[FIRST_SHOWN:]
    if not drawn and not constant:
        return None
    return join(
        tag("h3", title),
        tag("div", drawn[:FIRST_SHOWN], class_="plots") if drawn else None,
        details(f"{len(hidden)} more", tag("div", hidden, class_="plots")) if hidden else None,
        tag("p", f"The same at every step: {', '.join(constant)}.", class_="hint") if constant else None,
    )


def _is_loss(name: str) -> bool:
    return name.startswith("train/") and name.endswith("loss")


def _short(name: str) -> str:
    return name.split("/", 2 if name.startswith("eval/") else 1)[-1]


def _figure(name: str, lines: Sequence[Line]) -> Markup:
    told, legend, broken = [], [], []
    for line in lines:
        (steps, values), wrong = line.series, ~line.series.is_finite()
        first, last = (f"{number(float(values[at]))} at step {steps[at]:,}" for at in (0, -1))
        told.append(f"{line.name}: {first}, {last}, {len(steps):,} points.")
        value = tag("span", number(float(values[-1])), class_="value")
        legend.append(tag("li", swatch(line.number), tag("span", line.name, class_="run"), " ", value))
        if wrong.any():
            text = f"{line.name}: {wrong.sum():,} values are not finite, the first at step {steps[wrong][0]:,}."
            broken.append(tag("p", text, class_="note"))
    return tag(
        "figure",
        tag("figcaption", tag("strong", _short(name)), arrow(name)),
        line_plot(f"{name} over steps. {' '.join(told)}", lines, bool(_LOG.search(name))),
        tag("ul", legend, class_="legend"),
        broken,
    )
