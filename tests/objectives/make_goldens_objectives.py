"""Writes what transformers and open_clip make of the objectives of `peer_cases`: losses, and gradients in brief.

    python -m tests.objectives.make_goldens_objectives

Needs torch, transformers and open_clip. Weights and inputs come from numpy's seeds and are not kept.
"""

import importlib.metadata
import json
import zlib
from pathlib import Path

import jax
import numpy as np

from mmjax.sharding.mesh import make_mesh
from tests.objectives import peers
from tests.objectives.peer_cases import CASES, Flat, draw

PATH = Path(__file__).with_name("goldens_objectives.json")
DIRECTIONS = 3


def brief(gradient: Flat) -> dict[str, list[float]]:
    """The norm of each weight's gradient, and its components along some directions that its name decides.

    A direction's entries have a variance of 1: a difference of two gradients moves a component by about its own norm.
    """
    found = {}
    for path, value in gradient.items():
        directions = draw(zlib.crc32(path.encode())).normal(size=(DIRECTIONS, value.size))
        flat = value.ravel().astype(np.float64)
        found[path] = [float(f"{number:.8g}") for number in (np.linalg.norm(flat), *directions @ flat)]
    return found


def main() -> None:
    """Writes `goldens_objectives.json`."""
    made_with = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "open_clip_torch")}
    goldens = {}
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        for name, make in CASES.items():
            loss, gradient = peers.VALUE_AND_GRADIENT[name](make())
            goldens[name] = {"loss": loss, "gradient": brief(gradient)}
    PATH.write_text(json.dumps({"made_with": made_with, "cases": goldens}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
