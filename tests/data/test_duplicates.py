"""The perceptual hash tells what an image shows, and the search finds what a comparison of all pairs finds."""

import collections
import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax.data import duplicates, image

PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared" / "data" / "flickr8k_dev.tar"


def scene(seed, height=120, width=160):
    """Something like a photograph: soft shapes of many sizes."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for size in (3, 6, 12, 24):
        coarse = rng.uniform(0, 1, (size, size, 3))
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / size
    return np.uint8(200 * (pixels - pixels.min()) / np.ptp(pixels) + 20)


def again(pixels, quality=60):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return image.decode(buffer.getvalue())


VARIANTS = {
    "re-encoded": again,
    "brighter": lambda pixels: pixels + np.uint8(20),
    "darker": lambda pixels: np.uint8(0.85 * pixels),
    "larger": lambda pixels: cv2.resize(pixels, None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC),
    "a little smaller": lambda pixels: cv2.resize(pixels, None, fx=0.95, fy=0.95, interpolation=cv2.INTER_AREA),
}


def distance(first, second):
    return (first ^ second).bit_count()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_an_image_have_nearly_its_hash(variant):
    distances = [
        distance(duplicates.perceptual_hash(pixels), duplicates.perceptual_hash(VARIANTS[variant](pixels)))
        for pixels in map(scene, range(20))
    ]
    assert sorted(distances)[-2] <= 3, distances


def test_different_images_have_distant_hashes():
    hashes = [duplicates.perceptual_hash(scene(seed)) for seed in range(60)]
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def test_real_photographs():
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"{PHOTOGRAPHS} is not here")
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:200]
        pixels = [image.decode(archive.extractfile(member).read()) for member in members]
    hashes = np.array([duplicates.perceptual_hash(picture) for picture in pixels], np.uint64)
    variants = np.array([duplicates.perceptual_hash(again(picture)) for picture in pixels], np.uint64)
    differing = np.bitwise_count(hashes[:, None] ^ variants[None])
    same = np.eye(len(hashes), dtype=bool)
    assert np.mean(differing[same] <= 3) > 0.97 and differing[~same].min() > 5


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((50, 70, 3), 255, np.uint8),
        np.random.default_rng(0).integers(100, 103, (96, 96, 3)).astype(np.uint8),
        np.tile(np.linspace(0, 255, 96).astype(np.uint8)[:, None, None], (1, 96, 3)),
        np.repeat(np.uint8([[[0, 0, 0], [255, 255, 255]]]), 48, axis=1).repeat(96, axis=0),
        np.zeros((1, 1, 3), np.uint8),
    ],
    ids=["white", "noise", "gradient", "edge", "one pixel"],
)
def test_images_that_show_nothing_have_no_hash(pixels):
    assert duplicates.perceptual_hash(pixels) is None
    assert duplicates.perceptual_hash(again(pixels)) is None


def search(ids, hashes, limit):
    """As the pipeline does it: what shares a band is compared."""
    groups = collections.defaultdict(list)
    for record, value in zip(ids, hashes, strict=True):
        for band in duplicates.bands(value, limit):
            groups[band].append((record, value))
    found = {}
    for members in groups.values():
        records, values = np.array([m[0] for m in members], np.int64), np.array([m[1] for m in members], np.uint64)
        for record, partner in duplicates.near_pairs(records, values, limit):
            found[record] = min(partner, found.get(record, partner))
    return found


@st.composite
def crowded_hashes(draw):
    """Hashes of which many are near others: a few random ones with some bits turned."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    turns = st.lists(st.integers(0, 63), max_size=6)
    members = draw(st.lists(st.tuples(st.sampled_from(centres), turns), min_size=1, max_size=40))
    hashes = []
    for value, bits in members:
        for bit in bits:
            value ^= 1 << bit
        hashes.append(value)
    ids = draw(st.permutations(range(-5, len(hashes) - 5)))
    return ids, hashes


@settings(deadline=None, max_examples=200)
@given(crowded_hashes(), st.integers(0, duplicates.MAX_DISTANCE))
def test_the_search_finds_what_comparing_all_pairs_finds(records, limit):
    ids, hashes = records
    pairs = list(zip(ids, hashes, strict=True))
    expected = {}
    for record, value in pairs:
        near = [other for other, others in pairs if other < record and distance(value, others) <= limit]
        if near:
            expected[record] = min(near)
    assert search(ids, hashes, limit) == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, duplicates.MAX_DISTANCE))
def test_bands_hold_every_bit_once(value, limit):
    widths = [bits.bit_length() for _, bits in duplicates.bands(2**64 - 1, limit)]
    assert sum(widths) == 64 and len(widths) == limit + 1
    shift, together = 0, 0
    for (_, bits), width in zip(duplicates.bands(value, limit), widths, strict=True):
        together |= bits << shift
        shift += width
    assert together == value
