import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmjax.data import image
from mmjax.errors import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encoded(picture, form):
    file = io.BytesIO()
    picture.save(file, form, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_come_back_exactly(form):
    np.testing.assert_array_equal(image.decode(encoded(Image.fromarray(PHOTO), form)), PHOTO)


def test_grey_and_transparent_images_become_rgb():
    grey = Image.fromarray(PHOTO[..., 0])
    np.testing.assert_array_equal(image.decode(encoded(grey, "PNG")), np.repeat(PHOTO[..., :1], 3, axis=2))
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (image.decode(encoded(clear, "PNG")) == 255).all()


@pytest.mark.parametrize("data", [b"", b"no image", encoded(Image.fromarray(PHOTO), "PNG")[:30]])
def test_broken_bytes_are_an_error(data):
    with pytest.raises(UserError, match="cannot be decoded"):
        image.decode(data)


@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    size=st.integers(1, 40),
    area=st.floats(0.01, 1),
    aspect=st.floats(1, 2),
    seed=st.integers(0, 99),
)
def test_crops_have_the_size_and_only_colours_of_the_image(height, width, size, area, aspect, seed):
    plain = np.full((height, width, 3), (7, 80, 200), np.uint8)
    crop = image.random_resized_crop(plain, size, area, aspect, np.random.default_rng(seed))
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    assert np.abs(crop.astype(int) - (7, 80, 200)).max() <= 1


def test_a_full_crop_is_the_whole_image_and_a_partial_one_is_not():
    whole = image.random_resized_crop(PHOTO, 40, 1.0, 1.0, np.random.default_rng(0))
    assert np.abs(whole.astype(int) - image.resize(PHOTO, 40)).mean() < 12
    parts = [image.random_resized_crop(PHOTO, 40, 0.2, 1.0, np.random.default_rng(seed)) for seed in range(2)]
    assert (parts[0] != parts[1]).any()


def test_evaluation_resizes_like_pillow():
    expected = np.asarray(Image.fromarray(PHOTO).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(image.resize(PHOTO, 24), expected)


def test_mirror():
    np.testing.assert_array_equal(image.mirror(PHOTO)[:, 0], PHOTO[:, -1])
