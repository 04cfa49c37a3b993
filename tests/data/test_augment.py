import io
import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from mmjax.data import augment, image
from mmjax.data.augment import RAND_AUGMENT, RESIZES, Augment
from mmjax.errors import RecordError
from tests.data.make_goldens_image import picture

PHOTO = np.asarray(Image.fromarray(picture(20, 27)).resize((540, 400), Image.Resampling.BICUBIC))
SQUARE = np.asarray(Image.fromarray(picture(12, 12)).resize((96, 96), Image.Resampling.BICUBIC))


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def apply(settings_, pixels=PHOTO, seed=0, may_mirror=True):
    return settings_(pixels, may_mirror, np.random.default_rng(seed))


def distance(one, other):
    return np.abs(one.astype(int) - other).mean()


def windows(name, height, width, count=400, **options):
    rng = np.random.default_rng(0)
    settings_ = Augment(32, resize=name, **options)
    return [RESIZES[name](height, width, settings_, rng.random(40)) for _ in range(count)]


@settings(deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.integers(1, 48),
    name=st.sampled_from(sorted(RESIZES)),
    area=st.floats(0.01, 1),
    aspect=st.floats(1, 3),
    encoded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_window_of_any_image_has_the_size_and_only_its_colours(
    height, width, size, name, area, aspect, encoded, seed
):
    pixels = np.full((height, width, 3), (7, 80, 200), np.uint8)
    settings_ = Augment(size, name, area, aspect)
    window = RESIZES[name](height, width, settings_, np.random.default_rng(seed).random(40))
    top, left, window_height, window_width = window
    assert min(top, left) >= 0 and min(window_height, window_width) >= 1
    assert top + window_height <= height and left + window_width <= width
    result = apply(settings_, jpeg(pixels) if encoded else pixels, seed)
    assert result.shape == (size, size, 3) and result.dtype == np.uint8 and result.flags.c_contiguous
    assert np.abs(result.astype(int) - (7, 80, 200)).max() <= 3


def test_random_crops_keep_to_the_area_and_the_aspect_relative_to_the_image():
    found = np.array(windows("random_crop", 1000, 2000, crop_min_area=0.5, crop_max_aspect=1.5))
    area, aspect = found[:, 2] * found[:, 3] / 2e6, found[:, 3] / found[:, 2] / 2
    assert 0.45 < area.min() < 0.55 and area.max() <= 1
    assert 1 / 1.51 < aspect.min() < 0.75 and 1.35 < aspect.max() < 1.51
    assert len(set(found[:, 0])) > 100 and len(set(found[:, 1])) > 100


def test_inception_crops_keep_to_the_area_and_the_aspect_itself():
    found = np.array(windows("inception_crop", 1000, 1200, crop_min_area=0.08, crop_max_aspect=4 / 3))
    area, aspect = found[:, 2] * found[:, 3] / 1.2e6, found[:, 3] / found[:, 2]
    assert 0.079 < area.min() < 0.12 and 0.8 < area.max() <= 1
    assert 0.749 < aspect.min() < 0.78 and 1.29 < aspect.max() < 1.335


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (0, 44, 10, 13)), (100, 10, (44, 0, 13, 10))])
def test_an_inception_crop_that_never_fits_is_the_largest_in_the_middle(height, width, expected):
    assert windows("inception_crop", height, width, 1, crop_min_area=0.9, crop_max_aspect=4 / 3) == [expected]


def test_centre_and_squash():
    assert windows("center_crop", 30, 41, 1) == [(0, 5, 30, 30)]
    assert windows("squash", 30, 41, 1) == [(0, 0, 30, 41)]


def test_a_window_of_pixels_is_resized_close_to_the_antialiased_filter():
    noisy = np.clip(PHOTO + np.random.default_rng(0).normal(0, 20, PHOTO.shape), 0, 255).astype(np.uint8)
    for size in (32, 100, 150, 224, 400, 500):
        result = apply(Augment(size, "squash", mirror=0), noisy)
        exact = image.for_evaluation(noisy, image.Fit(size))
        aliased = cv2.resize(noisy, (size, size), interpolation=cv2.INTER_NEAREST)
        assert distance(result, exact) < 0.4 * distance(aliased, exact), size


@pytest.mark.parametrize("size", [20, 60, 90, 180, 224, 300])
@pytest.mark.parametrize("resize", RESIZES)
def test_bytes_and_pixels_give_nearly_the_same(size, resize):
    data = jpeg(PHOTO)
    settings_ = Augment(size, resize, crop_min_area=0.3, crop_max_aspect=1.3)
    for seed in range(4):
        assert distance(apply(settings_, data, seed), apply(settings_, image.decode(data), seed)) < 6


def test_the_orientation_is_applied_before_the_window_is_chosen():
    exif = Image.Exif()
    exif[0x0112] = 6
    settings_ = Augment(40, crop_min_area=0.3, crop_max_aspect=1.3)
    upright = image.decode(jpeg(PHOTO, exif=exif))
    assert upright.shape == (540, 400, 3)
    assert distance(apply(settings_, jpeg(PHOTO, exif=exif)), apply(settings_, upright)) < 4


@settings(deadline=None)
@given(
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    size=st.integers(1, 120),
    area=st.floats(0.02, 1),
    aspect=st.floats(1, 3),
    seed=st.integers(0, 999),
)
def test_a_reduced_window_is_never_smaller_than_the_result(height, width, size, area, aspect, seed):
    data = jpeg(np.zeros((height, width, 3), np.uint8))
    window = RESIZES["inception_crop"](
        height, width, Augment(size, "x", area, aspect), np.random.default_rng(seed).random(40)
    )
    cut = augment._cut(data, height, width, window, size)
    assert cut.shape[0] >= min(size, window[2]) and cut.shape[1] >= min(size, window[3])


def test_a_large_jpeg_is_decoded_at_the_largest_reduction():
    data = jpeg(PHOTO)  # 400 x 540
    assert augment._cut(data, 400, 540, (100, 100, 200, 270), 100).shape[:2] == (100, 135)
    for size, expected in ((201, (400, 540)), (200, (200, 270)), (101, (200, 270)), (100, (100, 135)), (9, (50, 68))):
        assert augment._cut(data, 400, 540, (0, 0, 400, 540), size).shape[:2] == expected


def test_mirroring_happens_half_the_time_and_only_where_it_may():
    plain = apply(Augment(40, "squash", mirror=0))
    results = [apply(Augment(40, "squash"), seed=seed) for seed in range(60)]
    mirrored = sum(np.array_equal(result, image.mirror(plain)) for result in results)
    assert mirrored + sum(np.array_equal(result, plain) for result in results) == 60
    assert 15 < mirrored < 45
    assert all(np.array_equal(apply(Augment(40, "squash"), seed=seed, may_mirror=False), plain) for seed in range(9))


EVERYTHING = Augment(
    64, "inception_crop", 0.3, 1.3, color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, rand_augment_layers=2
)


def test_the_random_numbers_decide_everything():
    data = jpeg(PHOTO)
    results = [apply(EVERYTHING, data, seed) for seed in range(20)]
    for seed, result in enumerate(results):
        np.testing.assert_array_equal(apply(EVERYTHING, data, seed), result)
    assert all(distance(one, other) > 1 for one, other in itertools.pairwise(results))


def test_colours_leave_the_window_as_it_is():
    plain = Augment(64, crop_min_area=0.2, color_jitter=(0, 0, 0, 0))
    grey = Augment(64, crop_min_area=0.2, grayscale=1.0, rand_augment_layers=2, rand_augment_magnitude=0)
    without = cv2.cvtColor(apply(plain), cv2.COLOR_RGB2GRAY)
    assert np.corrcoef(without.ravel(), apply(grey)[..., 0].ravel())[0, 1] > 0.8


def test_the_image_that_is_passed_in_stays_as_it_is():
    before = SQUARE.copy()
    for seed in range(10):
        apply(Augment(96, "squash", color_jitter=(0.4, 0.4, 0.4, 0.4), rand_augment_layers=3), SQUARE, seed)
    np.testing.assert_array_equal(SQUARE, before)


def test_jitter_without_strength_is_the_identity():
    for seed in range(5):
        jittered = Augment(40, "squash", mirror=0, color_jitter_probability=1.0)
        np.testing.assert_array_equal(apply(jittered, seed=seed), apply(Augment(40, "squash", mirror=0), seed=seed))


@pytest.mark.parametrize("index", range(4))
def test_each_jitter_changes_colours_with_its_probability(index):
    strengths = tuple(0.3 if number == index else 0.0 for number in range(4))
    plain = apply(Augment(96, "squash", mirror=0), SQUARE)
    for probability, expected in ((0.0, 0), (0.5, 30), (1.0, 60)):
        jittered = Augment(96, "squash", mirror=0, color_jitter=strengths, color_jitter_probability=probability)
        changed = sum(distance(apply(jittered, SQUARE, seed), plain) > 0.1 for seed in range(60))
        assert abs(changed - expected) <= (15 if probability == 0.5 else 3)


@pytest.mark.parametrize(
    ("change", "enhancer"),
    [
        (augment._brighten, ImageEnhance.Brightness),
        (augment._contrast, ImageEnhance.Contrast),
        (augment._saturate, ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("amount", [-1.0, -0.4, 0.0, 0.4, 1.5])
def test_colours_change_as_in_pillow(change, enhancer, amount):
    expected = np.asarray(enhancer(Image.fromarray(SQUARE)).enhance(1 + amount))
    assert np.abs(change(SQUARE, amount).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("amount", [-0.5, -0.1, 0.0, 0.05, 1 / 3])
def test_hue_turns_as_in_pillow(amount):
    hue, *rest = Image.fromarray(SQUARE).convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(round(amount * 255) % 256))
    expected = np.asarray(Image.merge("HSV", (turned, *rest)).convert("RGB"))
    assert distance(augment._shift_hue(SQUARE, amount), expected) < 2.5
    red = np.array([[[200, 0, 0]]], np.uint8)
    assert augment._shift_hue(red, 1 / 3)[0, 0].argmax() == 1 and augment._shift_hue(red, -1 / 3)[0, 0].argmax() == 2


def test_grayscale():
    grey = apply(Augment(96, "squash", mirror=0, grayscale=1.0), SQUARE)
    expected = np.asarray(Image.fromarray(SQUARE).convert("L"))
    assert np.abs(grey.astype(int) - expected[..., None]).max() <= 1


PILLOW = {
    "identity": lambda drawn: drawn,
    "auto_contrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "posterize": lambda drawn: ImageOps.posterize(drawn, 6),
    "solarize": lambda drawn: ImageOps.solarize(drawn, 127.5),
    "color": lambda drawn: ImageEnhance.Color(drawn).enhance(1.45),
    "contrast": lambda drawn: ImageEnhance.Contrast(drawn).enhance(1.45),
    "brightness": lambda drawn: ImageEnhance.Brightness(drawn).enhance(1.45),
    "sharpness": lambda drawn: ImageEnhance.Sharpness(drawn).enhance(1.45),
    # Pillow wants the way back, from the result to the image, and counts from the corners of pixels.
    "shear_x": lambda drawn: moved(drawn, (1, -0.15, 0.075, 0, 1, 0)),
    "shear_y": lambda drawn: moved(drawn, (1, 0, 0, -0.15, 1, 0.075)),
    "translate_x": lambda drawn: moved(drawn, (1, 0, -21, 0, 1, 0)),
    "translate_y": lambda drawn: moved(drawn, (1, 0, 0, 0, 1, -21)),
    "rotate": lambda drawn: drawn.rotate(15, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)),
}


def moved(drawn, matrix):
    return drawn.transform(
        drawn.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )


@pytest.mark.parametrize("name", RAND_AUGMENT)
def test_the_operations_of_rand_augment_do_as_pillow_does(name):
    result = RAND_AUGMENT[name](SQUARE, 0.5)
    assert result.shape == SQUARE.shape and result.dtype == np.uint8
    assert distance(result, np.asarray(PILLOW[name](Image.fromarray(SQUARE)))) < 1
    assert name == "identity" or distance(result, SQUARE) > 0.05


@pytest.mark.parametrize("name", RAND_AUGMENT)
def test_without_magnitude_only_what_has_none_changes_much(name):
    changed = distance(RAND_AUGMENT[name](SQUARE, 0.0), SQUARE)
    assert changed < 4 or name in ("auto_contrast", "equalize")


def test_every_operation_of_rand_augment_is_drawn():
    settings_ = Augment(96, "squash", mirror=0, rand_augment_layers=1, rand_augment_magnitude=15)
    results = [apply(settings_, SQUARE, seed) for seed in range(300)]
    for name, operation in RAND_AUGMENT.items():
        for share in (0.5, -0.5):
            assert any(np.array_equal(result, operation(SQUARE, share)) for result in results), (name, share)


@pytest.mark.parametrize("data", [b"", b"no image", jpeg(PHOTO)[:-200]])
def test_broken_bytes_are_a_record_error(data):
    with pytest.raises(RecordError, match="cannot be decoded"):
        apply(Augment(32), data)
