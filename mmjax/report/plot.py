"""Line plots and stacked bars as SVG, which needs no library to be shown."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mmjax.report.markup import Markup, join, tag
from mmjax.report.read import Series

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 180, 46, 8, 10, 34
COLUMNS, FLOOR = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM  # pixels that can hold a value, and where they end
COLOURS = 7  # in style.css; after so many runs they come again, dashed
MARKED = 25  # a line of so few points shows each of them
HOVERED = 40  # places at which a reader can ask for the values
LOG_RATIO = 10


class Line(NamedTuple):
    """A run's metric in a plot: `number` is the run's place, which chooses the colour."""

    number: int
    name: str
    series: Series


class _Scale(NamedTuple):
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        values, low, high = np.asarray(values, float), self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)


def line_plot(label: str, lines: Sequence[Line], may_be_log: bool = False) -> Markup:
    """A plot of lines over steps.

    Values that are not finite leave a gap, and a cross at the top.

    Args:
      label: what it shows, for those who do not see it.
      lines: one a run, none of them empty.
      may_be_log: a logarithmic axis, where all values are positive and the largest is LOG_RATIO times the smallest.
    """
    values = np.concatenate([line.series.finite().values for line in lines])
    log = may_be_log and len(values) > 0 and values.min() > 1e-300 and values.max() > LOG_RATIO * values.min()
    steps = np.unique(np.concatenate([line.series.steps for line in lines]))
    x = _Scale(int(steps[0]), int(max(steps[-1], steps[0] + 1)), LEFT, WIDTH - RIGHT)
    y = _Scale(*_range(values if len(values) else np.zeros(1), log), FLOOR, TOP, log)
    drawn = [_line(line, x, y) for line in lines]
    box = f"0 0 {WIDTH} {HEIGHT}"
    return tag(
        "svg", _axes(x, y), drawn, _hover(lines, steps, x), viewBox=box, class_="plot", role="img", aria_label=label
    )


def thin(
    steps: Int[np.ndarray, " points"], values: Float[np.ndarray, " points"], columns: int, low: int, high: int
) -> Int[np.ndarray, " kept"]:
    """The places of the points that a plot of so many pixel columns needs, in order.

    Of each column the smallest and the largest value stay, so that no spike vanishes, and the first and last point.
    """
    if len(steps) <= 2 * columns:
        return np.arange(len(steps))
    column = np.minimum((steps - low) * columns // (high - low), columns - 1)
    order = np.lexsort((values, column))
    change = np.flatnonzero(np.diff(column[order])) + 1
    smallest, largest = order[np.append(0, change)], order[np.append(change - 1, len(order) - 1)]
    return np.unique(np.concatenate([smallest, largest, [0, len(steps) - 1]]))


def stacked_bar(label: str, parts: Sequence[tuple[str, float]]) -> Markup:
    """A bar of shares that add up to 1; part number i has the class `k<i>`."""
    pieces, start = [], 0.0
    for place, (name, share) in enumerate(parts):
        title = tag("title", f"{name}: {share:.1%}")
        size = {"x": _percent(start), "width": _percent(share), "height": "100%"}
        pieces.append(tag("rect", title, class_=f"k{place}", **size))
        start += share
    return tag("svg", pieces, class_="bar", role="img", aria_label=label, width="100%", height=26)


def share_bar(share: float) -> Markup:
    """A small bar that is full at 1."""
    filled = tag("rect", width=_percent(min(max(share, 0.0), 1.0)), height="100%")
    return tag("svg", filled, class_="share", width=60, height=8, aria_hidden="true")


def swatch(number: int) -> Markup:
    """A run's colour in a legend."""
    line = tag("path", d="M1 5H17", class_=_colour(number))
    return tag("svg", line, class_="swatch", width=18, height=10, aria_hidden="true")


def _colour(number: int) -> str:
    return f"line c{number % COLOURS}" + (" dashed" if number // COLOURS % 2 else "")


def _percent(share: float) -> str:
    return f"{share * 100:.3f}%"


def _range(values: Float[np.ndarray, " points"], log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        margin = (high / low) ** 0.05
        return low / margin, high * margin
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(scale: _Scale, most: int, whole: bool = False) -> list[float]:
    """Round numbers in the range of an axis."""
    if scale.log:
        first, last = math.floor(math.log10(scale.low)), math.floor(math.log10(scale.high))
        decades = [10.0**exponent for exponent in range(first, last + 1)]
        if len(decades) > 3:
            return [tick for tick in decades if tick >= scale.low][:: -(-len(decades) // most)]
        return [m * decade for decade in decades for m in (1, 2, 5) if scale.low <= m * decade <= scale.high]
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _short(value: float) -> str:
    """A number in a few characters, for an axis."""
    value = float(f"{value:.6g}")
    for size, unit, over in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if size <= abs(value) < 1e12:
            return f"{value / over:g}{unit}"
    return f"{value:g}"


def _axes(x: _Scale, y: _Scale) -> Markup:
    grid, labels = [], []
    for tick in _ticks(y, 5):
        place = f"{float(y(tick)):.1f}"
        grid.append(f"M{LEFT} {place}H{WIDTH - RIGHT}")
        labels.append(tag("text", _short(tick), x=LEFT - 5, y=place, dy="0.32em", text_anchor="end"))
    for tick in _ticks(x, 5, whole=True):
        place = f"{float(x(tick)):.1f}"
        grid.append(f"M{place} {FLOOR}v4")
        anchor = "end" if float(x(tick)) > WIDTH - RIGHT - 12 else "middle"
        labels.append(tag("text", _short(tick), x=place, y=FLOOR + 15, text_anchor=anchor))
    title = "step (values on a log axis)" if y.log else "step"
    labels.append(tag("text", title, x=(LEFT + WIDTH - RIGHT) // 2, y=HEIGHT - 4, text_anchor="middle"))
    frame = tag("path", class_="axis", d=f"M{LEFT} {TOP}V{FLOOR}H{WIDTH - RIGHT}")
    return join(tag("path", class_="grid", d="".join(grid)), frame, labels)


def _line(line: Line, x: _Scale, y: _Scale) -> Markup:
    """A run's curve; crosses where it is not finite."""
    series, known, look = line.series.finite(), line.series.is_finite(), _colour(line.number)
    kept = thin(series.steps, series.values, COLUMNS, int(x.low), int(x.high))
    across, down = x(series.steps[kept]).tolist(), y(series.values[kept]).tolist()
    gaps = np.cumsum(~known)[known][kept].tolist()  # how many values are missing before each
    path, before = [], None
    for a, d, gap in zip(across, down, gaps, strict=True):
        path.append(f"{'L' if gap == before else 'M'}{a:.1f} {d:.1f}")
        before = gap
    made = [tag("path", class_=look, d="".join(path))] if path else []
    if len(path) <= MARKED or len(set(gaps)) > 1:  # a point between two gaps has no line
        dots = "".join(f"M{a:.1f} {d:.1f}h0" for a, d in zip(across, down, strict=True))
        made.append(tag("path", class_=f"{look} dots", d=dots))
    crosses = np.unique(x(line.series.steps[~known]).round())
    if len(crosses):
        made.append(tag("path", class_=look, d="".join(f"M{a - 3:.0f} {TOP - 3}l6 6m0-6l-6 6" for a in crosses)))
    return join(made)


def _hover(lines: Sequence[Line], steps: Int[np.ndarray, " steps"], x: _Scale) -> list[Markup]:
    """Strips side by side that say, when one points at them, the values at a step within them."""
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, HOVERED).round().astype(int))]
    centres = x(chosen)
    edges = np.concatenate([[LEFT], (centres[1:] + centres[:-1]) / 2, [WIDTH - RIGHT]])
    strips = []
    for place, step in enumerate(chosen.tolist()):
        told = [f"step {step:,}"]
        for line in lines:
            at = min(int(np.searchsorted(line.series.steps, step)), len(line.series.steps) - 1)
            found = int(line.series.steps[at])
            if edges[place] <= float(x(found)) <= edges[place + 1]:
                told.append(f"{line.name}: {line.series.values[at]:.5g}" + (f" at {found:,}" if found != step else ""))
        size = {"x": f"{edges[place]:.1f}", "width": f"{edges[place + 1] - edges[place]:.1f}"}
        strips.append(tag("rect", tag("title", "\n".join(told)), class_="hover", y=TOP, height=FLOOR - TOP, **size))
    return strips
