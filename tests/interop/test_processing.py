"""How images are read: Hugging Face's preprocessor_config.json in all the ways in which it has been written."""

import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop import processing

SQUASH = {"resize": "squash", "resample": "bilinear", **processing.INCEPTION}
CROP = {"resize": "center_crop", "resample": "bicubic", **processing.OPENAI}
SQUARE = {"height": 224, "width": 224}

# The file, what holds where it is silent, and (image_size, resize, resample, crop_fraction).
FILES = {
    "nothing, ViT": ({}, SQUASH, (224, "squash", "bilinear", 1.0)),
    "nothing, CLIP": ({}, CROP, (224, "center_crop", "bicubic", 1.0)),
    "one number, ViT": ({"size": 224}, SQUASH, (224, "squash", "bilinear", 1.0)),
    "one number, CLIP": ({"size": 224, "crop_size": 224}, CROP, (224, "center_crop", "bicubic", 1.0)),
    "two numbers": ({"size": [224, 224], "resample": 3}, SQUASH, (224, "squash", "bicubic", 1.0)),
    "named": ({"size": SQUARE}, SQUASH, (224, "squash", "bilinear", 1.0)),
    "DINOv2": ({"size": {"shortest_edge": 256}, "crop_size": SQUARE}, CROP, (224, "center_crop", "bicubic", 224 / 256)),
    "a larger square": (
        {"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 2},
        SQUASH,
        (224, "squash", "bilinear", 224 / 256),
    ),
    "BEiT": ({"size": 224, "do_center_crop": False, "crop_size": 200}, SQUASH, (224, "squash", "bilinear", 1.0)),
    "CLIP that squashes": ({"size": SQUARE, "do_center_crop": False}, CROP, (224, "squash", "bicubic", 1.0)),
    "SigLIP that crops": (
        {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": SQUARE},
        SQUASH,
        (224, "center_crop", "bilinear", 1.0),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_sizes_are_read_and_written(name):
    processor, default, wanted = FILES[name]
    found = processing.read(processor, 224, default)
    assert tuple(found[key] for key in ("image_size", "resize", "resample", "crop_fraction")) == wanted
    written = processing.write(configs.image_encoder(**found), "AnyImageProcessor")
    for other in (SQUASH, CROP):  # it says all of it
        assert processing.read(written, 224, other) == found


def test_a_fraction_that_is_no_quotient_is_rounded_as_timm_does():
    encoder = configs.image_encoder(crop_fraction=0.9, resize="center_crop")
    assert processing.write(encoder, "")["size"] == {"shortest_edge": 248}


REFUSED = {
    "a size of {'shortest_edge': 224, 'longest_edge': 400} is neither": {
        "size": {"shortest_edge": 224, "longest_edge": 400}
    },
    "is neither that of a square": {"size": {"height": 224, "width": 320}},
    "a size of {'max_height': 224, 'max_width': 224} is neither": {"size": {"max_height": 224, "max_width": 224}},
    "images keep their shape": {"size": {"shortest_edge": 224}, "do_center_crop": False},
    "224 pixels cannot be cut out of 200": {"size": 200, "crop_size": 224, "do_center_crop": True},
    "images of 384 pixels for a model of 224": {"size": 384},
    "resample 0 is neither bilinear nor bicubic": {"resample": 0},
    "do_normalize is off": {"do_normalize": False},
    "rescale_factor is 0.0078": {"rescale_factor": 1 / 127.5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_expressed_is_refused(message):
    with pytest.raises(UserError) as error:
        processing.read(REFUSED[message], 224, SQUASH)
    assert message in str(error.value)


def test_a_model_may_read_another_size():
    assert processing.read({"size": 384}, 224, SQUASH, any_size=True)["image_size"] == 384
