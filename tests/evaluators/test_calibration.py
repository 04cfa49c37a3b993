"""Whether a classifier is right as often as it says."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.evaluators import calibration, contact_sheet, zeroshot
from mmjax.validation import validate
from tests import tiny
from tests.evaluators import make_goldens_calibration as goldens
from tests.evaluators.make_goldens_zeroshot import CLASSIFICATIONS, classification, unit
from tests.test_api_text import model


@pytest.mark.parametrize("wanted", json.loads(goldens.PATH.read_text())["errors"], ids=lambda each: str(each["error"]))
def test_the_error_is_torchmetrics(wanted, monkeypatch):
    monkeypatch.setattr(zeroshot, "CHUNK", 64)
    images, classes, labels = classification(*CLASSIFICATIONS[wanted["name"]])
    right = zeroshot.class_ranks(images, classes, labels, [*map(str, range(len(classes)))]) == 0
    sure = zeroshot.confidences(images, classes, wanted["scale"])
    assert calibration.binned(sure, right, wanted["bins"]).error == pytest.approx(wanted["error"], abs=1e-6)


def test_a_bin_ends_with_its_upper_edge():
    bins = calibration.binned(np.array([0.2, 0.2000001, 0.9, 1.0]), np.array([True, False, True, True]), 5)
    assert bins.counts.tolist() == [1, 1, 0, 0, 2]
    assert bins.accuracy.tolist() == [1, 0, 0, 0, 1]
    assert bins.confidence == pytest.approx([0.2, 0.2000001, 0, 0, 0.95])
    assert bins.error == pytest.approx((0.8 + 0.2 + 2 * 0.05) / 4)


def test_ties_and_nans_count_against_the_model():
    same, labels = unit(np.repeat(np.random.default_rng(0).normal(size=(1, 100)), 40, axis=0)), np.arange(40) % 30
    for images, wanted in ((same, 1 / 30), (np.full_like(same, np.nan), 1.0)):  # sure of nothing; of everything
        right = zeroshot.class_ranks(images, same[:30], labels, [*map(str, range(30))]) == 0
        bins = calibration.binned(zeroshot.confidences(images, same[:30], 100.0), right, 15)
        assert bins.error == pytest.approx(wanted, abs=1e-6) and bins.counts.sum() == 40


def test_confidence_is_what_the_model_says(openmoji_folder):
    """Of softmax its probability; of sigmoid a class's share of the odds."""
    one, (images, texts, _) = model(everything=False), classification(0, 50, 7)
    scale = one.logits()["logit_scale"]
    pairs = one.similarity(images, texts).astype(float)
    odds = pairs / (1 - pairs)
    shares = odds / odds.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(zeroshot.confidences(images, texts, scale), shares.max(axis=1), rtol=1e-4)
    softmax = copy.copy(one)
    softmax.config = one.config.copy_and_resolve_references()
    softmax.config.objectives.contrastive = configs.objective(kind="softmax")
    likeliest = softmax.similarity(images, texts).max(axis=1)
    assert np.ptp(likeliest) > 0.1
    np.testing.assert_allclose(zeroshot.confidences(images, texts, scale), likeliest, rtol=1e-5)


def test_the_diagram_has_a_bar_for_each_bin_that_has_images(tmp_path):
    path = tmp_path / "new" / "diagram.png"
    green = []
    for share in (0, 1):
        calibration.draw(path, calibration.binned(np.full(9, 0.5), np.arange(9) < 9 * share, 4))
        pixels = np.asarray(Image.open(path))
        green.append((pixels == contact_sheet.RIGHT).all(axis=2))
        assert (pixels == contact_sheet.WRONG).all(axis=2).any()
    assert green[0].sum() < calibration.SIDE
    columns = np.flatnonzero(green[1].sum(axis=0) > calibration.SIDE / 2)
    assert len(columns) == pytest.approx(calibration.SIDE / 4, abs=3)
    assert columns[0] == calibration.MARGIN + calibration.SIDE // 4


@pytest.mark.parametrize("make", [configs.zeroshot, configs.linear_probe])
def test_there_is_at_least_one_bin(make):
    config = tiny.get_config()
    config.evaluators.e = make(calibration_bins=0)
    with pytest.raises(UserError, match="evaluators.e.calibration_bins: 0 is less than 1"):
        validate(config, 8)
