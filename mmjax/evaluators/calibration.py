"""Whether a classifier is right as often as it says: expected calibration error and the reliability diagram.

After "On Calibration of Modern Neural Networks" (Guo et al. 2017), section 2.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw, ImageFont

from mmjax.evaluators.contact_sheet import GAP, INK, PAPER, RIGHT, WRONG

SIDE, COUNTS, MARGIN, LINE, GRID = 300, 75, 46, 22, (222, 222, 222)


class Bins(NamedTuple):
    """Predictions by their confidence, in bins of equal width: their number, mean confidence and share of right ones.

    Bin m of M holds confidences above m / M, up to (m + 1) / M. Means of an empty bin are 0.
    """

    counts: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """The expected calibration error (section 2, equation 3): the mean over predictions of the distance between a
        bin's accuracy and its confidence.
        """
        return float(self.counts @ np.abs(self.accuracy - self.confidence) / self.counts.sum())


def confidences(logits: Float[np.ndarray, "images classes"]) -> Float[np.ndarray, " images"]:
    """The probability, by softmax, of each image's likeliest class; 1 where a logit is NaN."""
    highest = logits.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinities
        found = 1 / np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    return np.where(np.isnan(found), 1.0, found)


def binned(confidence: Float[np.ndarray, " images"], right: Bool[np.ndarray, " images"], bins: int) -> Bins:
    """Predictions in bins: how sure they were, and whether they are right."""
    places = np.searchsorted(np.arange(1, bins) / bins, confidence)
    counts = np.bincount(places, minlength=bins)
    sums = (np.bincount(places, values, bins) for values in (confidence, right))
    return Bins(counts, *(each / np.maximum(counts, 1) for each in sums))


def draw(path: Path, bins: Bins) -> None:
    """Draws the reliability diagram as PNG: each bin's accuracy as a bar, its mean confidence as a red line, where the
    bar would end if the model were calibrated; below it, how many predictions each bin has.

    Args:
      path: where; the folder is made.
      bins: what to draw.
    """
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    top = GAP + 2 * LINE
    bottom = top + SIDE + LINE + COUNTS
    sheet = Image.new("RGB", (MARGIN + SIDE + 2 * GAP, bottom + 2 * LINE + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    title = f"{bins.counts.sum():,} images, expected calibration error {bins.error:.3f}"
    pen.text((GAP, GAP), title, INK, font)
    pen.text((GAP, GAP + LINE), "bars: accuracy; red: mean confidence; below: images", INK, small)
    for tenth in range(0, 11, 2):
        y, x = top + SIDE - tenth * SIDE // 10, MARGIN + tenth * SIDE // 10
        pen.line((MARGIN, y, MARGIN + SIDE, y), GRID)
        pen.text((MARGIN - 6, y), f"{tenth / 10:.1f}", INK, small, anchor="rm")
        pen.text((x, bottom + 4), f"{tenth / 10:.1f}", INK, small, anchor="mt")
    for box, colour in _boxes(bins, top + SIDE, bottom):
        pen.rectangle(box, colour)
    pen.line((MARGIN, top + SIDE, MARGIN + SIDE, top), INK)
    pen.text((MARGIN + SIDE // 2, bottom + LINE), "confidence", INK, small, anchor="mt")
    pen.text((MARGIN - 6, bottom - COUNTS), f"{bins.counts.max():,}", INK, small, anchor="rm")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _boxes(bins: Bins, base: int, bottom: int) -> Iterator[tuple[tuple[int, ...], tuple[int, int, int]]]:
    """The corners and the colour of each bar, which stands on `base`, or for counts on `bottom`."""
    edges = MARGIN + np.arange(len(bins.counts) + 1) * SIDE // len(bins.counts)
    for number in np.flatnonzero(bins.counts):
        left, right = int(edges[number]), max(int(edges[number]), int(edges[number + 1]) - 2)
        accuracy, confidence = (base - round(SIDE * each[number]) for each in (bins.accuracy, bins.confidence))
        yield (left, accuracy, right, base), RIGHT
        yield (left, confidence - 1, right, confidence + 1), WRONG
        yield (left, bottom - round(COUNTS * bins.counts[number] / bins.counts.max()), right, bottom), INK
