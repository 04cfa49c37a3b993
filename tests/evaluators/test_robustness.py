"""Corruptions of real images, and what a classifier makes of them."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from mmjax import config as configs
from mmjax.data.image_reader import Reader
from mmjax.data.pipeline import evaluation_images
from mmjax.data.sources import open_source
from mmjax.errors import UserError
from mmjax.evaluators import EVALUATORS
from mmjax.evaluators.corruptions import STRENGTHS, VERSIONS, blur, greyscale, versions
from mmjax.evaluators.images import Images
from mmjax.evaluators.robustness import Corrupted
from mmjax.validation import validate
from tests import tiny
from tests.evaluators.test_zeroshot import LABELS, Oracle, folder
from tests.test_api_text import model

__all__ = ["folder"]
COUNT = len(VERSIONS)


@pytest.fixture(scope="module")
def drawings(openmoji_folder):
    """Ten drawings of the embedded data set, 112 pixels a side."""
    return evaluation_images(open_source("openmoji:en", "test"), Reader(112), range(10))[0]


def evaluator_of(source, **options):
    evaluator = EVALUATORS["robustness"](configs.robustness(source=source, split="", **options))
    evaluator.open()
    return evaluator


def test_blur_is_the_gaussian_of_scipy_and_grows_with_the_image(drawings):
    for pixels in drawings[:3]:
        made = versions(pixels, 0, 0)
        for severity, deviation in enumerate(STRENGTHS["blur"], start=1):
            sigma = deviation * 112 / 224
            expected = gaussian_filter(pixels.astype(float), (sigma, sigma, 0), mode="nearest", truncate=4.0)
            np.testing.assert_allclose(made[severity], expected, atol=0.51)
    np.testing.assert_array_equal(blur(drawings[0], 0.1), drawings[0])  # of a small image it is less than a pixel


def test_noise_has_the_deviation_and_comes_from_seed_and_number_alone():
    grey = np.full((224, 224, 3), 128, np.uint8)
    made = versions(grey, 3, 5)
    for severity, deviation in enumerate(
        STRENGTHS["noise"][:3], start=6
    ):  # of more, much is cut off at black and white
        assert (made[severity] - 128.0).std() / 255 == pytest.approx(deviation, rel=0.02)
        assert abs(made[severity].mean() - 128) < 0.5
    np.testing.assert_array_equal(made, versions(grey, 3, 5))
    for seed, index in ((3, 6), (4, 5)):
        other = versions(grey, seed, index)
        assert [np.array_equal(*pair) for pair in zip(made, other, strict=True)] == [
            not 6 <= n <= 10 for n in range(21)
        ]


def test_jpeg_is_what_comes_back_from_a_file(drawings):
    made = versions(drawings[0], 0, 0)
    for severity, quality in enumerate(STRENGTHS["jpeg"], start=11):
        file = io.BytesIO()
        Image.fromarray(drawings[0]).save(file, "JPEG", quality=quality)
        np.testing.assert_array_equal(made[severity], Image.open(file))


def test_greyscale_goes_to_luma_in_five_steps(drawings):
    pixels = drawings[0]
    made, grey = versions(pixels, 0, 0)[16:], np.asarray(Image.fromarray(pixels).convert("L"), float)[..., None]
    for share, found in zip((0.2, 0.4, 0.6, 0.8, 1.0), made, strict=True):
        np.testing.assert_allclose(found, (1 - share) * pixels + share * grey, atol=1.1)
    assert (np.ptp(made[4], axis=2) == 0).all() and np.ptp(made[3], axis=2).any()
    np.testing.assert_array_equal(greyscale(pixels, 0.0), pixels)


def test_more_severe_is_further_from_the_image(drawings):
    made = np.stack([versions(pixels, 0, index) for index, pixels in enumerate(drawings)])
    assert made.shape == (10, COUNT, 112, 112, 3) and made.dtype == np.uint8
    np.testing.assert_array_equal(made[:, 0], drawings)
    away = np.abs(made[:, 1:] - made[:, :1].astype(float)).mean(axis=(0, 2, 3, 4)).reshape(4, 5)
    assert away.min() > 0 and (np.diff(away, axis=1) > 0).all()


def test_rows_are_the_same_whoever_loads_them(folder):
    """Batches, devices and processes only differ in which rows are asked for at once."""
    source, oracle = open_source(f"folder:{folder}"), Oracle()
    everything = Corrupted(Images(source, oracle), 7, 0)(np.arange(12 * COUNT))
    for rows in (np.arange(3, 40), np.array([11 * COUNT, 0, 5, 251, 251]), np.arange(20, 22)):
        np.testing.assert_array_equal(Corrupted(Images(source, oracle), 7, 0)(rows), everything[rows])
    later = Corrupted(Images(source, oracle), 7, 4)(np.arange(2 * COUNT))
    np.testing.assert_array_equal(later, everything[4 * COUNT : 6 * COUNT])


class Picky(Oracle):
    """Knows an image only where its version is one of these."""

    def __init__(self, known, seed):
        super().__init__()
        self.seed, self.known, self.batches = seed, known, []

    def encode_rows(self, modality, count, load_rows, batch_size):
        if modality == "text":
            return super().encode_rows(modality, count, load_rows, batch_size)
        rows = load_rows(np.arange(count))
        first, self.batches = sum(self.batches), [*self.batches, count // COUNT]
        labels = LABELS[np.arange(first, first + count // COUNT)].repeat(COUNT)
        known = np.isin(np.arange(count) % COUNT, [VERSIONS.index(name) for name in self.known])
        clean = rows.reshape(-1, COUNT, *rows.shape[1:])[:, 0]
        expected = [versions(pixels, self.seed, first + number) for number, pixels in enumerate(clean)]
        np.testing.assert_array_equal(rows, np.concatenate(expected))
        return np.eye(6, dtype=np.float32)[np.where(known, labels, (labels + 1) % 6)]


def test_the_metrics_are_shares_and_their_means(folder):
    oracle = Picky({"clean", "blur_1", "blur_2", "greyscale_5"}, seed=3)
    metrics = dict(evaluator_of(f"folder:{folder}", batch_size=5, seed=3).evaluate(oracle))
    assert oracle.batches == [5, 5, 2]
    names = {f"top1_{name}" for name in (*VERSIONS, *STRENGTHS)} | {"mean_corrupted_top1", "relative_robustness"}
    assert set(metrics) == names
    assert {name for name in VERSIONS if metrics[f"top1_{name}"] == 1} == oracle.known
    assert [metrics[f"top1_{kind}"] for kind in STRENGTHS] == pytest.approx([0.4, 0, 0, 0.2])
    assert metrics["mean_corrupted_top1"] == pytest.approx(3 / 20)
    assert metrics["relative_robustness"] == pytest.approx(3 / 20)
    assert dict(evaluator_of(f"folder:{folder}").evaluate(Picky({"blur_1"}, 0)))["relative_robustness"] == 0


def test_a_real_tower_gives_the_same_on_one_and_on_eight_devices(openmoji_folder, folder):
    found = []
    for devices, batch_size in ((1, 8), (8, 8), (1, 24)):
        made, beats = model(devices, everything=False), []
        made = made.with_params(made.params, 0)
        made._on_batch = lambda beats=beats: beats.append(1)
        found.append(dict(evaluator_of(f"folder:{folder}", batch_size=batch_size).evaluate(made)))
        assert len(beats) == math.ceil(18 / batch_size) + {8: 21 + math.ceil(4 * 21 / 8), 24: 11}[batch_size]
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])
    assert found[0]["top1_clean"] > 0 and len({*found[0].values()}) > 3
    zeroshot = EVALUATORS["zeroshot"](configs.zeroshot(source=f"folder:{folder}", split="", batch_size=8))
    zeroshot.open()
    assert dict(zeroshot.evaluate(model(everything=False)))["zeroshot_top1"] == pytest.approx(found[0]["top1_clean"])


def test_images_that_cannot_be_read_are_counted_once(folder):
    (folder / "dog" / "07.png").write_bytes(b"no picture")
    assert dict(evaluator_of(f"folder:{folder}").evaluate(Picky({"clean"}, 0)))["unreadable_images"] == 1


def test_the_corruptions_are_drawn_where_that_is_asked_for(folder, tmp_path):
    path = tmp_path / "new" / "sheet.png"
    dict(evaluator_of(f"folder:{folder}").evaluate(Picky({"clean"}, 0), path))
    assert not path.exists()
    dict(evaluator_of(f"folder:{folder}", contact_sheet=True).evaluate(Picky({"clean"}, 0), path))
    assert Image.open(path).width > 6 * 112


def test_mistakes_are_one_line(folder, tmp_path):
    config = tiny.get_config()
    config.evaluators.e = configs.robustness()
    validate(config, 8)
    config.evaluators.e.seed = -1
    with pytest.raises(UserError, match="evaluators.e.seed: -1 is less than 0"):
        validate(config, 8)
    config.evaluators.e = configs.robustness(confusion_matrix=True)
    with pytest.raises(UserError, match="unknown key config.evaluators.e.confusion_matrix"):
        validate(config, 8)
    config.evaluators.e = configs.robustness()
    config.objectives = {"captioning": configs.objective(kind="captioning")}
    config.model.decoder = configs.decoder(depth=1, reads="text")
    config.model.encoders.text.causal = True
    del config.evaluators["test"]
    with pytest.raises(UserError, match="evaluators.e: it compares embeddings, which no objective trains"):
        validate(config, 8)
    (tmp_path / "one").mkdir()
    (folder / "dog").rename(tmp_path / "one" / "dog")
    with pytest.raises(UserError, match="there is the one class 'dog': nothing to tell apart"):
        evaluator_of(f"folder:{tmp_path / 'one'}")
