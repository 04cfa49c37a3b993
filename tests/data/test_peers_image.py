"""The evaluation path against the live image processors of transformers."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmjax.data import image
from tests.data.make_goldens_image import CASES, READ, import_torchvision, picture, processed

transformers = pytest.importorskip("transformers")

PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "flickr8k_dev.tar"


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    try:
        return import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))


def difference(name, backend, pixels, size):
    if not hasattr(transformers, f"{name}ImageProcessor{backend}"):
        pytest.skip(f"this transformers has no {name}ImageProcessor{backend}")
    ours = image.for_evaluation(pixels, READ[name](size)[1])
    return np.abs(ours.astype(int) - processed(name, pixels, size, backend))


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("case", [*CASES, (375, 500, 224), (601, 333, 224), (120, 77, 224)], ids=str)
def test_synthetic_images_match(name, backend, case):
    height, width, size = case
    assert difference(name, backend, picture(height, width), size).mean() < 0.5


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize("name", READ)
def test_photos_match(name, backend):
    if not PHOTOS.exists():
        pytest.skip(f"{PHOTOS} is not here")
    with tarfile.open(PHOTOS) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:12]
        photos = [archive.extractfile(member).read() for member in members]
    for data in photos:
        pixels = image.decode(data)
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        for size in (64, 224):
            assert difference(name, backend, pixels, size).mean() < 0.5
