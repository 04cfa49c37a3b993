"""The figures of `scaling.py` as small multiples: a row for each quantity, a column for what is varied."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

matplotlib.use("agg")  # needs no display
COLORS = {"data": "#1f6fb4", "fsdp": "#d9650a", "tensor": "#3a923a"}
GRAY = "#777777"
# What is varied -> what is fixed, the horizontal axis.
COLUMNS = {
    "weak": ("weak: {rows} rows a device", "devices"),
    "strong": ("strong: {batch} rows in all", "devices"),
    "batch": ("batch: {devices} devices", "rows of the global batch"),
    "parameters": ("model: {devices} devices, {batch} rows in all", "parameters, millions"),
}
ROWS = ("step, seconds", "step, CPU time (one device: 1)", "memory of a device, MB", "checkpoint, seconds")
CHECKPOINTS = (("strong", "save"), ("strong", "restore"), ("parameters", "save"), ("parameters", "restore"))


def draw(series: Mapping[str, Mapping[str, list]], metrics: Mapping[str, float], path: Path) -> None:
    """Draws `scaling.SERIES` with the metrics that were measured into a PNG file."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5}
    with pyplot.rc_context(style):
        figure, rows = pyplot.subplots(4, 4, figsize=(12, 11), sharey="row", layout="constrained")
        for axes, (name, lines) in zip(rows[0], series.items(), strict=True):
            _step_time(axes, name, lines, metrics)
        for axes, (name, lines) in zip(rows[1], series.items(), strict=True):
            _overhead(axes, name, lines, metrics)
        rows[1][0].set_ylim(bottom=0)
        for axes, (name, lines) in zip(rows[2], series.items(), strict=True):
            _memory(axes, name, lines, metrics)
        for axes, (name, kind) in zip(rows[3], CHECKPOINTS, strict=True):
            _checkpoint(axes, name, kind, series[name], metrics)
        for row, label in zip(rows, ROWS, strict=True):
            row[0].set_ylabel(label, fontsize=10)
        rows[2][0].text(0.03, 0.05, "dotted: parameters and optimizer", transform=rows[2][0].transAxes, fontsize=8)
        rows[3][0].text(0.97, 0.05, "dotted: training waits", transform=rows[3][0].transAxes, fontsize=8, ha="right")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
        keys = [Line2D([], [], color=color, marker="o", markersize=4, label=axis) for axis, color in COLORS.items()]
        keys.append(Line2D([], [], color=GRAY, linestyle="--", label="one device, same global batch"))
        figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def _step_time(axes: Axes, name: str, lines: Mapping[str, list], metrics: Mapping[str, float]) -> None:
    baseline = next(iter(lines.values()))
    places = [_place(name, case, metrics) for case in baseline]
    alone = [metrics[f"{case.on_one_device.name}/step_seconds"] for case in baseline]
    axes.plot(places, alone, color=GRAY, linestyle="--", linewidth=1.2)
    _plot(axes, name, lines, metrics, lambda case: metrics[f"{case.name}/step_seconds"])
    _finish(axes, name, places, baseline)


def _overhead(axes: Axes, name: str, lines: Mapping[str, list], metrics: Mapping[str, float]) -> None:
    axes.axhline(1, color=GRAY, linestyle="--", linewidth=1.2)
    _plot(axes, name, lines, metrics, lambda case: metrics.get(f"{case.name}/cpu_over_one_device", 1.0))
    cases = next(iter(lines.values()))
    _finish(axes, name, [_place(name, case, metrics) for case in cases], cases)
    axes.set_yscale("linear")


def _memory(axes: Axes, name: str, lines: Mapping[str, list], metrics: Mapping[str, float]) -> None:
    def kept(case) -> float:
        return metrics[f"{case.name}/parameters_megabytes"] + metrics[f"{case.name}/optimizer_megabytes"]

    _plot(axes, name, lines, metrics, lambda case: metrics[f"{case.name}/step_megabytes"])
    _plot(axes, name, lines, metrics, kept, linestyle=":", marker="")
    cases = next(iter(lines.values()))
    _finish(axes, name, [_place(name, case, metrics) for case in cases], cases)


def _checkpoint(axes: Axes, name: str, kind: str, lines: Mapping[str, list], metrics: Mapping[str, float]) -> None:
    _plot(axes, name, lines, metrics, lambda case: metrics[f"{case.name}/{kind}_seconds"])
    if kind == "save":
        seconds = "save_blocking_seconds"
        _plot(axes, name, lines, metrics, lambda case: metrics[f"{case.name}/{seconds}"], linestyle=":", marker="")
    cases = next(iter(lines.values()))
    _finish(axes, name, [_place(name, case, metrics) for case in cases], cases)
    millions = metrics[f"{cases[0].name}/parameters"] / 1e6
    fixed = f"{cases[0].devices} devices" if name == "parameters" else f"{millions:.1f} M parameters"
    axes.set_title(f"{kind}: {fixed}")


def _plot(
    axes: Axes, name: str, lines: Mapping[str, list], metrics: Mapping[str, float], value: Callable, **style
) -> None:
    for axis, cases in lines.items():
        places = [_place(name, case, metrics) for case in cases]
        look = {"color": COLORS[axis], "marker": "o", "markersize": 4, "linewidth": 1.6} | style
        axes.plot(places, [value(case) for case in cases], **look)


def _place(name: str, case, metrics: Mapping[str, float]) -> float:
    """Where a case stands on the horizontal axis."""
    if name == "parameters":
        return metrics[f"{case.name}/parameters"] / 1e6
    return case.batch if name == "batch" else case.devices


def _finish(axes: Axes, name: str, places: list[float], cases: list) -> None:
    """Logarithmic axes whose labels are plain numbers: what was measured below, 1-2-5 at the left."""
    title, label = COLUMNS[name]
    last = cases[-1]
    axes.set_title(title.format(rows=last.batch // last.devices, batch=last.batch, devices=last.devices))
    axes.set_xlabel(label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{place:.3g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
