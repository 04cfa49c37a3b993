"""Which images are the same: a hash of what an image shows, and the search for hashes that are close.

The hash is the DCT hash of "Implementation and Benchmarking of Perceptual Image Hash Functions" (Zauner 2010, section
3.2.1), over the lowest frequencies: one bit for each, whether its coefficient lies above their median. It sees
brightness alone: drawings that differ only in hue count as near.
"""

import itertools
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import Int64, UInt8, UInt64

BITS = 64
MAX_DISTANCE = 8  # beyond it, bands get so short that many records share one
_SIDE = 32  # pixels; what the image is shrunk to
_FREQUENCIES = sorted(
    ((row, column) for row in range(_SIDE) for column in range(_SIDE) if row or column), key=lambda f: (sum(f), f)
)[:BITS]
_ROWS, _COLUMNS = np.array(_FREQUENCIES).T
_WEIGHTS = np.uint64(1) << np.arange(BITS, dtype=np.uint64)
_FIRM = 1.0  # grey levels: re-encoding as JPEG moves a coefficient by about so much
_MIN_FIRM_BITS = BITS // 2
_MAX_COMPARED = 2**22  # pairs of hashes at once


def perceptual_hash(pixels: UInt8[np.ndarray, "height width 3"]) -> int | None:
    """64 bits that stay nearly the same when the image is re-encoded, scaled or made brighter.

    Returns:
      None where most bits would be decided by noise: flat images, plain gradients, a single edge.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    coefficients = cv2.dct(small)[_ROWS, _COLUMNS]
    distances = coefficients - np.median(coefficients)
    if np.count_nonzero(np.abs(distances) > _FIRM) < _MIN_FIRM_BITS:
        return None
    return int(_WEIGHTS[distances > 0].sum(dtype=np.uint64))


def bands(value: int, distance: int) -> Iterator[tuple[int, int]]:
    """Cuts a hash into `distance + 1` pieces: (number, bits).

    Two hashes that differ in at most `distance` bits have a piece in common: there are more pieces than differences.
    """
    edges = [round(BITS * number / (distance + 1)) for number in range(distance + 2)]
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        yield number, value >> low & (1 << high - low) - 1


def near_pairs(
    ids: Int64[np.ndarray, " records"], hashes: UInt64[np.ndarray, " records"], distance: int
) -> Iterator[tuple[int, int]]:
    """(id, the lowest id whose hash differs in at most `distance` bits) of every record that has a lower one.

    Every record counts as a lower one, whether or not it has a lower one itself: so the result does not depend on
    the order of the search, and chains of near images leave their first alone. All records of one value of one band
    are compared with each other; memory grows with their number alone.
    """
    order = np.argsort(ids)
    ids = ids[order]
    hashes, firsts, groups = np.unique(hashes[order], return_index=True, return_inverse=True)
    lowest = np.empty(len(hashes), np.int64)
    rows = max(1, _MAX_COMPARED // max(1, len(hashes)))
    for begin in range(0, len(hashes), rows):
        differing = np.bitwise_count(hashes[begin : begin + rows, None] ^ hashes[None])
        lowest[begin : begin + rows] = np.where(differing <= distance, firsts[None], len(ids)).min(1)
    for position, group in enumerate(groups):
        if lowest[group] < position:
            yield int(ids[position]), int(ids[lowest[group]])
