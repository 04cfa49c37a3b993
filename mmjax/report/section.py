"""What the sections of the page share."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from mmjax.report.markup import Markup, join, tag
from mmjax.report.plot import swatch
from mmjax.report.read import Run


class Section(NamedTuple):
    """A part of the page: `key` is its address in the page, and what the notes of a run name it by."""

    key: str
    title: str
    content: Markup


def section(runs: Sequence[Run], key: str, title: str, *content) -> Section:
    """A section; what could not be read for it stands first."""
    told = [tag("p", f"{run.name}: {text}", class_="note") for run in runs for text in run.notes.get(key, ())]
    return Section(key, title, join(told, *content))


def nothing(text: str) -> Markup:
    """Says that something is not there."""
    return tag("p", text, class_="nothing")


def run_titles(runs: Sequence[Run]) -> list[Markup]:
    """The runs as titles of columns, with their colours."""
    return [join(swatch(number), " ", run.name) for number, run in enumerate(runs)]


def number(value: float) -> str:
    """A number for a table, with four significant digits."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3e}"
    return f"{value:.4g}"
