"""Line plots and stacked bars as SVG, which needs no library to be shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mmjax.report.markup import Markup, join, tag
from mmjax.report.read import Series

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 180, 48, 8, 8, 34
COLUMNS = WIDTH - LEFT - RIGHT  # pixels that can hold a value
COLOURS = 7  # in style.css
MARKED = 25  # a line of so few points shows each of them
LOG_RATIO = 10


@dataclass(frozen=True)
class Line:
    """A run's metric in a plot: `number` is the run's place, which chooses the colour."""

    number: int
    name: str
    series: Series


@dataclass(frozen=True)
class _Scale:
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


def colour(number: int) -> str:
    """The classes of a run's colour; after COLOURS runs they come again, dashed."""
    return f"c{number % COLOURS}" + (" dashed" if number // COLOURS % 2 else "")


def line_plot(label: str, lines: Sequence[Line], may_be_log: bool = False) -> Markup:
    """A plot of lines over steps.

    Values that are not finite leave a gap, and a cross at the top.

    Args:
      label: what it shows, for those who do not see it.
      lines: one a run, none of them empty.
      may_be_log: a logarithmic axis, where all values are positive and the largest is LOG_RATIO times the smallest.
    """
    finite = [line.series.finite().values for line in lines]
    values = np.concatenate(finite) if any(map(len, finite)) else np.array([0.0])
    log = is_log(values) and may_be_log
    first = min(int(line.series.steps[0]) for line in lines)
    last = max(int(line.series.steps[-1]) for line in lines)
    x = _Scale(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    y = _Scale(*_range(values, log), HEIGHT - BOTTOM, TOP, log)
    return tag(
        "svg",
        _axes(x, y),
        [_line(line, x, y) for line in lines],
        tag("path", class_="cursor", d=f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}", visibility="hidden"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="plot",
        role="img",
        tabindex=0,
        aria_label=label,
        data_range=f"{x.low} {x.high} {LEFT} {WIDTH - RIGHT} {WIDTH}",
    )


def is_log(values: Float[np.ndarray, " points"]) -> bool:
    """Whether they are positive and far enough apart for a logarithmic axis."""
    return bool(len(values)) and values.min() > 1e-300 and values.max() > LOG_RATIO * values.min()


def thin(
    steps: Int[np.ndarray, " points"], values: Float[np.ndarray, " points"], columns: int, low: float, high: float
) -> Int[np.ndarray, " kept"]:
    """The places of the points that a plot of so many pixel columns needs, in order.

    Of each column the smallest and the largest value stay, so that no spike vanishes; so do the first and the last point.
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
    for number, (name, share) in enumerate(parts):
        title = tag("title", f"{name}: {share:.1%}")
        pieces.append(tag("rect", title, x=_percent(start), width=_percent(share), height="100%", class_=f"k{number}"))
        if share > 0.08:
            middle = _percent(start + share / 2)
            pieces.append(tag("text", f"{share:.0%}", x=middle, y="50%", dy="0.35em", class_=f"on{number}"))
        start += share
    return tag("svg", pieces, class_="bar", role="img", aria_label=label, width="100%", height=26)


def bar(share: float) -> Markup:
    """A small bar that is full at 1."""
    filled = tag("rect", width=_percent(min(max(share, 0), 1)), height="100%")
    return tag("svg", filled, class_="share", width=60, height=8, aria_hidden="true")


def swatch(number: int) -> Markup:
    """A run's colour in a legend."""
    line = tag("path", d="M1 5H17", class_=f"line {colour(number)}")
    return tag("svg", line, class_="swatch", width=18, height=10, aria_hidden="true")


def short(value: float) -> str:
    """A number in a few characters, for an axis."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


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
        exponents = range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)
        if len(exponents) >= 2:
            return [10.0**exponent for exponent in exponents][:: -(-len(exponents) // most)]
        decade = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)))
        return [m * 10.0**e for e in decade for m in (1, 2, 5) if scale.low <= m * 10.0**e <= scale.high]
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _axes(x: _Scale, y: _Scale) -> Markup:
    floor = HEIGHT - BOTTOM
    grid, labels = [], []
    for tick in _ticks(y, 5):
        place = f"{float(y(tick)):.1f}"
        grid.append(f"M{LEFT} {place}H{WIDTH - RIGHT}")
        text = short(float(f"{tick:.6g}"))
        labels.append(tag("text", text, x=LEFT - 5, y=place, dy="0.32em", text_anchor="end"))
    for tick in _ticks(x, 5, whole=True):
        place = f"{float(x(tick)):.1f}"
        grid.append(f"M{place} {floor}v4")
        anchor = "end" if float(x(tick)) > WIDTH - RIGHT - 12 else "middle"
        labels.append(tag("text", short(tick), x=place, y=floor + 15, text_anchor=anchor))
    labels.append(tag("text", "step", x=(LEFT + WIDTH - RIGHT) // 2, y=HEIGHT - 4, text_anchor="middle"))
    if y.log:
        labels.append(tag("text", "log", x=LEFT + 4, y=TOP + 9))
    frame = tag("path", class_="axis", d=f"M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}")
    return join(tag("path", class_="grid", d="".join(grid)), frame, labels)


def _line(line: Line, x: _Scale, y: _Scale) -> Markup:
    """A run's curve with its values, for the script that shows them; crosses where they are not finite."""
    series, known = line.series.finite(), line.series.is_finite()
    kept = thin(series.steps, series.values, COLUMNS, x.low, x.high)
    steps, values = series.steps[kept], series.values[kept]
    gaps = np.cumsum(~known)[known][kept]
    across, down = x(steps), y(values)
    points = [f"{a:.1f} {d:.1f}" for a, d in zip(across.tolist(), down.tolist(), strict=True)]
    made = [
        tag(
            "path",
            class_=f"line {colour(line.number)}",
            d=_path(points, gaps),
            data_run=line.number,
            data_x=" ".join(map(str, steps.tolist())),
            data_y=" ".join(f"{value:.5g}" for value in values.tolist()),
        )
    ]
    if len(points) <= MARKED:
        for a, d, step, value in zip(across, down, steps, values, strict=True):
            title = tag("title", f"{line.name}, step {step:,}: {value:.5g}")
            made.append(tag("circle", title, cx=f"{a:.1f}", cy=f"{d:.1f}", r=2.5, class_=colour(line.number)))
    crosses = np.unique(x(line.series.steps[~known]).round())
    if len(crosses):
        path = "".join(f"M{a - 3:.0f} {TOP}l6 6m0-6l-6 6" for a in crosses)
        title = tag("title", f"{line.name}: not finite")
        made.append(tag("path", title, class_=f"line {colour(line.number)}", d=path))
    return join(made)


def _path(points: Sequence[str], gaps: Int[np.ndarray, " points"]) -> str:
    """The curve, with a new beginning after every gap; a point between two gaps is a dot."""
    begins: Bool[np.ndarray, " points"] = np.append(True, np.diff(gaps) > 0)[: len(points)]
    ends = np.append(begins[1:], True)
    return "".join(
        f"{'M' if begin else 'L'}{point}{'h0' if begin and end else ''}"
        for point, begin, end in zip(points, begins, ends, strict=False)
    )
