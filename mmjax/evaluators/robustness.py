"""Zero-shot classification of images that are blurred, noisy, compressed and grey.

After "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (Hendrycks & Dietterich 2019),
with the accuracy itself in place of its error relative to another model's.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from mmjax.api import Model
from mmjax.data import image
from mmjax.errors import UserError
from mmjax.evaluators import contact_sheet
from mmjax.evaluators.corruptions import STRENGTHS, VERSIONS, versions
from mmjax.evaluators.images import Images, unreadable
from mmjax.evaluators.zeroshot import ZeroShot, class_embeddings, class_ranks


class Robustness(ZeroShot):
    """The evaluator `robustness`; its fields are those of `mmjax.config.robustness`. Classes are as in `ZeroShot`."""

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields `top1_clean`, `top1_blur_1` to `top1_greyscale_5`, the mean of each corruption (`top1_blur`), the mean
        of all, `mean_corrupted_top1`, and what share of `top1_clean` that is, `relative_robustness`.

        Draws the first image's corruptions if asked to.

        Raises:
          UserError: the model reads images of any shape.
        """
        if model.config.model.encoders.image.max_patches:
            raise UserError("robustness corrupts images of one size, and this model reads images of any shape")
        entry, load_images = self._entry, Images(self._source, model)
        top1 = dict(zip(VERSIONS, self._accuracies(model, load_images), strict=True))
        yield from unreadable(load_images)
        for version, value in top1.items():
            yield f"top1_{version}", value
        for kind in STRENGTHS:
            yield f"top1_{kind}", float(np.mean([top1[version] for version in VERSIONS if version.startswith(kind)]))
        mean = float(np.mean([top1[version] for version in VERSIONS[1:]]))
        yield "mean_corrupted_top1", mean
        yield "relative_robustness", mean / top1["clean"] if top1["clean"] else 0.0
        if entry.contact_sheet and picture is not None:
            _draw(picture, versions(load_images(np.arange(1))[0], entry.seed, 0))

    def _accuracies(self, model: Model, load_images: Images) -> list[float]:
        """The share of right images of each of VERSIONS; the embeddings of one batch's images are held at a time."""
        size, right = self._entry.batch_size, np.zeros(len(VERSIONS))
        classes = class_embeddings(model, self._classes, self._templates, size)
        for first in range(0, len(self._labels), size):
            labels = np.repeat(self._labels[first : first + size], len(VERSIONS))
            load = Corrupted(load_images, self._entry.seed, first)
            images = model.encode_rows("image", len(labels), load, size)
            found = class_ranks(images, classes, labels, self._classes)
            right += (found == 0).reshape(-1, len(VERSIONS)).sum(axis=0)
        return (right / len(self._labels)).tolist()


class Corrupted:
    """Loads rows: all versions of image `first`, then those of the next one, and so on."""

    def __init__(self, load_images: Images, seed: int, first: int):
        self._load_images, self._seed, self._first = load_images, seed, first

    def __call__(self, rows: Int[np.ndarray, " rows"]) -> UInt8[np.ndarray, "rows size size 3"]:
        """The pixels of these rows; each image is read once for all of its rows."""
        places, numbers = np.divmod(rows, len(VERSIONS))
        indices = self._first + np.unique(places)
        clean = self._load_images(indices)
        found = np.empty((len(rows), *clean.shape[1:]), np.uint8)
        for index, pixels in zip(indices.tolist(), clean, strict=True):
            own = places == index - self._first
            found[own] = versions(pixels, self._seed, index)[numbers[own]]
        return found


def _draw(path: Path, corrupted: UInt8[np.ndarray, "versions size size 3"]) -> None:
    tiles = [image.for_evaluation(each, image.Fit(contact_sheet.TILE)) for each in corrupted]
    titles = [f"{kind}: none, then severity 1 to 5 ({', '.join(map(str, STRENGTHS[kind]))})" for kind in STRENGTHS]
    rows = [[tiles[0], *tiles[start : start + 5]] for start in range(1, len(tiles), 5)]
    contact_sheet.draw(path, titles, rows)
