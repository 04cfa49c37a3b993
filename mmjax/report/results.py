"""The section of results, and what is known of the metrics: whether more of them is better."""

import re
from collections.abc import Sequence

import numpy as np

from mmjax.report.markup import Markup, breakable, join, row, table, tag
from mmjax.report.read import Run, names_of
from mmjax.report.section import Section, nothing, number, run_titles, section

# Searched for in this order in a metric's name; what none of them knows has no best.
_NEITHER = re.compile(r"_std$|_l2$|unreadable_images|count|seconds")
_LOWER = re.compile(
    r"(median|mean)_rank|loss|bits_per_byte|perplexity|error|(^|_)(ece|nll|brier|fid)(_|$)", re.IGNORECASE
)
_HIGHER = re.compile(
    r"R@\d|mAP|precision|recall|top\d|accuracy|auc|robustness|exact_match|BLEU|ROUGE|CIDEr|(^|_)(score|f1)(_|$)"
)
_ALIAS = re.compile(r"eval/[^/]+/(image|text)_retrieval_recall@5")  # other names of R@5


def direction(name: str) -> int:
    """1 where more of a metric is better, -1 where less is, 0 where neither is known."""
    metric = name.split("/")[-1]
    if _NEITHER.search(metric):
        return 0
    if _LOWER.search(metric):
        return -1
    return 1 if _HIGHER.search(metric) else 0


def arrow(name: str) -> Markup | None:
    """An arrow that says which way a metric of an evaluator is better."""
    way = direction(name) if name.startswith("eval/") else 0
    if not way:
        return None
    words = "higher is better" if way > 0 else "lower is better"
    return tag("span", "\u00a0↑" if way > 0 else "\u00a0↓", class_="way", role="img", title=words, aria_label=words)


def is_alias(name: str) -> bool:
    """Whether a metric is another name of a number that is there."""
    return bool(_ALIAS.fullmatch(name))


def results(runs: Sequence[Run]) -> Section:
    """Every evaluator's metrics at the last step that it reported of, a run a column, the best of each row in bold."""
    names = [name for name in names_of(runs) if _of_evaluator(name)]
    if not names:
        return section(runs, "results", "Results", nothing("No evaluator has reported anything."))
    never = [run.name for run in runs if not any(map(_of_evaluator, run.metrics))]
    told = [nothing(f"{name}: no evaluator has reported anything.") for name in never]
    hint = "Each evaluator's metrics at the last step that it reported of; ↑ and ↓ say which way is better."
    hint += " The best of a row is bold." if len(runs) > 1 else ""
    evaluators = dict.fromkeys(name.split("/")[1] for name in names)
    tables = [_evaluator(runs, each, [n for n in names if n.startswith(f"eval/{each}/")]) for each in evaluators]
    made = tag("div", tables, class_="results" if len(runs) > 2 else "results narrow")
    return section(runs, "results", "Results", tag("p", hint, class_="hint"), told, made)


def _of_evaluator(name: str) -> bool:
    return name.startswith("eval/") and name.count("/") >= 2 and not is_alias(name)


def _evaluator(runs: Sequence[Run], evaluator: str, names: Sequence[str]) -> Markup:
    """An evaluator's title and table."""
    steps = [max((int(run.metrics[n].steps[-1]) for n in names if n in run.metrics), default=None) for run in runs]
    entries = [run.evaluator(evaluator) for run in runs]
    about = next((f" {entry['kind']} on {entry.get('source')}" for entry in entries if "kind" in entry), None)
    rows = [row("step", ["–" if step is None else f"{step:,}" for step in steps], "hint")]
    rows += [row(join(breakable(name.split("/", 2)[2]), arrow(name)), _cells(runs, name, steps)) for name in names]
    made = table(evaluator, ["metric", *run_titles(runs)], rows, "numbers")
    return tag("div", tag("h3", evaluator, about and tag("span", about, class_="about")), made, class_="block")


def _cells(runs: Sequence[Run], name: str, steps: Sequence[int | None]) -> list[Markup]:
    values = [_at(run, name, step) for run, step in zip(runs, steps, strict=True)]
    best, cells = _best(values, direction(name)), []
    for place, value in enumerate(values):
        text = "–" if value is None else number(value)
        if place in best:
            cells.append(tag("td", tag("strong", text), class_="best"))
        else:
            cells.append(tag("td", text, class_="bad" if value is not None and not np.isfinite(value) else None))
    return cells


def _at(run: Run, name: str, step: int | None) -> float | None:
    series = run.metrics.get(name)
    return float(series.values[-1]) if series is not None and series.steps[-1] == step else None


def _best(values: Sequence[float | None], way: int) -> set[int]:
    """The places of the best of several values that are numbers."""
    known = {place: value * way for place, value in enumerate(values) if value is not None and np.isfinite(value)}
    if not way or len({*known.values()}) < 2:
        return set()
    return {place for place, value in known.items() if value == max(known.values())}
