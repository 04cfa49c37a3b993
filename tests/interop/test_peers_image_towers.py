"""ViT, BEiT and DINOv2 beside transformers."""

import json

import numpy as np
import pytest

from tests.data.make_goldens_image import picture, square
from tests.interop import folders, image_towers, peers
from tests.interop.image_towers import CASES, Case

transformers = peers.transformers()
import torch  # noqa: E402

_BEIT = {"use_shared_relative_position_bias": True, "use_mask_token": True}
# What is not said is the default there. DINOv2 is published for 518 pixels and reads 224 of 256.
PUBLISHED = {
    "google/vit-base-patch16-224": Case(
        "vit", "ViTForImageClassification", {"num_labels": 1000}, {"size": 224, "resample": 2}
    ),
    "microsoft/beit-base-patch16-224-pt22k": Case(
        "beit", "BeitForMaskedImageModeling", _BEIT, {"size": 224, "do_center_crop": False, "resample": 2}
    ),
    "facebook/dinov2-base": Case(
        "dinov2", "Dinov2Model", {"image_size": 518}, {"size": {"shortest_edge": 256}, "crop_size": square(224)}
    ),
}
CONFIGS = {"vit": "ViTConfig", "beit": "BeitConfig", "dinov2": "Dinov2Config"}
ALL = CASES | PUBLISHED
NAMES = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)]


def of(case):
    """Their model with random weights."""
    config = getattr(transformers, CONFIGS[case.family])(**case.settings)
    return peers.randomized(getattr(transformers, case.kind)(config))


def assert_agree(found, wanted):
    for key, value in wanted.items():
        assert folders.relative_error(found[key], value) < peers.TOLERANCE, key


@pytest.mark.parametrize("name", NAMES)
def test_outputs_agree_both_ways(name, tmp_path):
    case = ALL[name]
    reference = of(case)
    model, exported = peers.there_and_back(reference, tmp_path, case.write_processor)
    encoder = model.config.model.encoders.image
    pixels = folders.pixels(2, encoder.image_size)
    inputs = peers.normalized(pixels, encoder)
    found, wanted = image_towers.ours(model, pixels), image_towers.theirs(reference, inputs)
    assert_agree(found, wanted)
    again = image_towers.theirs(getattr(transformers, case.kind).from_pretrained(exported).eval(), inputs)
    for key, value in wanted.items():
        np.testing.assert_array_equal(again[key], value)
    if "logits" not in wanted:
        assert_agree(found, image_towers.theirs(transformers.AutoModel.from_pretrained(exported).eval(), inputs))
    elif case.kind.endswith("Classification"):
        classifier = transformers.AutoModelForImageClassification.from_pretrained(exported).eval()
        assert_agree(found, image_towers.theirs(classifier, inputs))
        assert tuple(classifier.config.id2label.values()) == model.config.model.classifier.labels


@pytest.mark.parametrize("name", CASES)
def test_images_are_read_as_their_processors_do(name, tmp_path):
    """From a file's pixels to the outputs, by the processor that they make of what we export."""
    case = CASES[name]
    model, exported = peers.there_and_back(of(case), tmp_path, case.write_processor)
    images = [picture(41, 57), picture(70, 33)]
    fits = [model._loader(images)(np.array([index]))[0] for index in range(2)]
    for folder in (tmp_path / "theirs", exported):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        inputs = processor(images, return_tensors="pt")["pixel_values"]
        own = peers.normalized(np.stack(fits), model.config.model.encoders.image)
        assert torch.abs(inputs - own).max() < 1e-5


def test_positions_are_interpolated_at_every_size(tmp_path):
    """As by DINOv2 in transformers, down and up, and of images that are no squares."""
    case = CASES["dinov2"]
    model, _ = peers.there_and_back(of(case), tmp_path, case.write_processor)
    reference = transformers.Dinov2Model.from_pretrained(tmp_path / "theirs").eval()
    for height, width in ((8, 8), (24, 24), (40, 28), (16, 64)):
        pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
        inputs = peers.normalized(pixels, model.config.model.encoders.image)
        found = model.features_rows("image", 2, lambda rows, pixels=pixels: pixels[rows])
        assert folders.relative_error(found, image_towers.theirs(reference, inputs)["features"]) < peers.TOLERANCE


def test_a_classifier_fine_tuned_from_another_library_keeps_its_labels(tmp_path):
    config = transformers.ViTConfig(**image_towers.TOWER, num_labels=3)  # no names: LABEL_0, ...
    model, exported = peers.there_and_back(
        peers.randomized(transformers.ViTForImageClassification(config)), tmp_path, CASES["vit"].write_processor
    )
    assert model.config.model.classifier.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert json.loads((exported / "config.json").read_text())["id2label"]["2"] == "LABEL_2"
