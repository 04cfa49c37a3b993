"""The curves of `loss_curve.py`: a column for each loss, both curves above, their difference below."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

matplotlib.use("agg")  # needs no display
# What lies below is wide and pale, what lies above thin and dark: curves that agree hide each other otherwise.
LOOKS = {
    "open_clip": {"color": "#f2a65a", "linewidth": 5, "solid_capstyle": "round"},
    "mmjax": {"color": "#1f4e79", "linewidth": 1.3},
}
GRAY = "#777777"


def draw(curves: Mapping[str, Mapping[str, list[float]]], limit: float, path: Path) -> None:
    """Draws {objective: {"mmjax": losses, "open_clip": losses}} into a PNG file, and how large a difference may be."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with pyplot.rc_context(style):
        figure, (above, below) = pyplot.subplots(
            2, len(curves), figsize=(9, 5.2), sharex=True, sharey="row", height_ratios=(3, 2), layout="constrained"
        )
        for axes, (objective, losses) in zip(above, curves.items(), strict=True):
            for name, look in LOOKS.items():
                axes.plot(_steps(losses[name]), losses[name], label=name, **look)
            axes.set_title(objective)
        for axes, losses in zip(below, curves.values(), strict=True):
            difference = np.abs(np.subtract(losses["mmjax"], losses["open_clip"]))
            axes.plot(_steps(difference), np.where(difference > 0, difference, np.nan), "o", color="#1f4e79", ms=2.5)
            axes.axhline(limit, color=GRAY, linestyle="--", linewidth=1.2)
            axes.set_yscale("log")
            axes.set_ylim(1e-7, 3 * limit)
            axes.set_xlabel("step")
        below[0].text(2, 1.3 * limit, f"limit: {limit:g}", color=GRAY)
        above[0].set_ylabel("loss")
        below[0].set_ylabel("absolute difference\n(no dot: none)")
        above[0].legend(frameon=False)
        for axes in (*above, *below):
            axes.grid(color="#e6e6e6", linewidth=0.7)
            axes.set_axisbelow(True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def _steps(losses: list[float]) -> range:
    return range(1, len(losses) + 1)
