"""Images as a tower reads them outside of training: at one size, or as patches of an image that keeps its shape."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmjax.data.image import RESAMPLES, Fit, Pixels, for_evaluation

# [images, size, size, 3]; or by name `patches` and `shape`, see `Reader`.
Rows = np.ndarray | dict[str, np.ndarray]
GREY = np.full((1, 1, 3), 128, np.uint8)  # in place of an image that cannot be read
_SCALES, _PRECISION = (1e-6, 100.0), 1e-5  # between which a scale is searched for, and how closely


class Reader(NamedTuple):
    """Reads images of any size. Fields: those of `mmjax.config.image_encoder`, and the side of a patch in pixels.

    Returns uint8 [images, size, size, 3]; with `max_patches` (NaFlex: "SigLIP 2", Tschannen et al. 2025, section
    2.4.2) a dictionary of `patches` uint8 [images, max_patches, patch * patch * 3], an image's first, row by row, then
    padding, and `shape` int32 [images, 2], how many rows and columns of patches there are.
    """

    image_size: int
    resize: str = "squash"
    resample: str = "bicubic"
    crop_fraction: float = 1.0
    max_patches: int = 0
    patch: int = 0

    @classmethod
    def of(cls, encoder: Mapping[str, Any]) -> "Reader":
        """The reader for an encoder with these settings."""
        fields = {name: encoder[name] for name in cls._fields if name != "patch"}
        return cls(**fields, patch=int(encoder["variant"].partition("/")[2]))

    def __call__(self, images: Iterable[Pixels]) -> Rows:
        if not self.max_patches:
            fit = Fit(self.image_size, self.resize, self.resample, self.crop_fraction)
            return np.stack([for_evaluation(pixels, fit) for pixels in images])
        rows = [self._patches(pixels) for pixels in images]
        return {"patches": np.stack([row[0] for row in rows]), "shape": np.array([row[1] for row in rows], np.int32)}

    def _patches(self, pixels: Pixels) -> tuple[UInt8[np.ndarray, "max_patches values"], tuple[int, int]]:
        patch, grid = self.patch, fitting_grid(*pixels.shape[:2], self.patch, self.max_patches)
        size = grid[1] * patch, grid[0] * patch
        resized = np.asarray(Image.fromarray(pixels).resize(size, RESAMPLES[self.resample]))
        cut = resized.reshape(grid[0], patch, grid[1], patch, 3).swapaxes(1, 2)
        patches = np.zeros((self.max_patches, patch * patch * 3), np.uint8)
        patches[: grid[0] * grid[1]] = cut.reshape(grid[0] * grid[1], -1)
        return patches, grid


def fitting_grid(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches of an image that is resized to have as many as it may, its shape nearly kept.

    Both sides are rounded up to whole patches; the scale is the largest, to 1e-5, with which they are not too many.
    """

    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

    fits, too_large = _SCALES
    while too_large - fits >= _PRECISION:
        middle = (fits + too_large) / 2
        rows, columns = grid(middle)
        fits, too_large = (middle, too_large) if rows * columns <= max_patches else (fits, middle)
    return grid(fits)
