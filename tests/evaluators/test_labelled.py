"""What evaluators on labelled images share, with every format and with a real tower on 1 and 8 devices."""

import numpy as np
import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.evaluators import EVALUATORS, Evaluation
from mmjax.evaluators.labelled import Labelled
from mmjax.validation import validate
from tests import tiny
from tests.data import samples
from tests.evaluators.pictures import Pictures, evaluate, write_splits
from tests.test_api_text import model

KINDS = {
    "linear_probe": configs.linear_probe(l2=1.0),
    "knn": configs.knn(k=3),
    "few_shot": configs.few_shot(shots=(1, 2)),
}


def opened(source, **options):
    evaluator = Labelled(configs.knn(source=source, **options))
    evaluator.open()
    return evaluator


def test_every_format_has_labels(tmp_path):
    written = samples.write_all(tmp_path)
    wanted = [samples.label(n) for n in range(samples.COUNT)]
    for kind, source in written.items():
        entry = configs.knn(source=source, split="train").to_dict()
        assert [name for _, name in Labelled(configs.knn())._classes(entry)] == wanted, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_tower_gives_the_same_on_one_and_on_eight_devices(tmp_path, openmoji_folder, kind):
    """15 images in batches of 8: what fills the last one up is not counted."""
    entry = KINDS[kind].copy_and_resolve_references()
    entry.source, entry.batch_size = write_splits(tmp_path), 8
    one = evaluate(EVALUATORS[kind], entry, model(everything=False))
    eight = evaluate(EVALUATORS[kind], entry, model(devices=8, everything=False))
    assert one == pytest.approx(eight) and all(np.isfinite([*one.values()]))


def test_features_are_what_the_tower_pools(openmoji_folder):
    one, images = model(everything=False), np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    pooled = one.features_rows("image", 3, lambda rows: images[rows], 2)
    assert pooled.shape == (3, 32) and pooled.dtype == np.float32
    projected = pooled @ one.params["image_projection"]["kernel"]
    np.testing.assert_allclose(
        projected / np.linalg.norm(projected, axis=1, keepdims=True), one.encode_image(images), atol=1e-5
    )
    assert one.features_rows("image", 0, lambda rows: images[rows]).shape == (0, 32)


@pytest.mark.parametrize("kind", ["linear_probe", "knn"])
def test_recalls_are_written_beside_the_picture(tmp_path, kind):
    picture = tmp_path / "pictures" / "probe-00000001.png"
    entry = KINDS[kind].copy_and_resolve_references()
    entry.source = write_splits(tmp_path, label=lambda n: n // 10)
    table = np.eye(3)[np.arange(30) // 10]
    table[[1, 11, 13]] = table[21]  # these are taken for the last class
    evaluator = EVALUATORS[kind](entry)
    evaluator.open()
    metrics = dict(evaluator.evaluate(Pictures(table), picture))
    assert metrics[f"{kind}_top1"] == pytest.approx(12 / 15)
    lines = picture.with_suffix(".csv").read_text().splitlines()
    assert lines == ["class,images,recall", "0,5,0.8", "1,5,0.6", "2,5,1.0"]


def test_classes_may_have_names(tmp_path):
    source = write_splits(tmp_path)
    entry = configs.knn(source=source, class_caption="kind", k=1)
    entry.fields.captions = ("kind",)
    table = np.eye(2)[[samples.label(n) for n in range(30)]]
    assert evaluate(EVALUATORS["knn"], entry, Pictures(table)) == {"knn_top1": 1.0}
    assert opened(source, fields=entry.fields, class_caption="kind")._class_count == 2


def test_unreadable_images_are_grey_and_counted(tmp_path):
    source = write_splits(tmp_path)
    for number in (0, 1):  # one of each split
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    table = np.eye(2)[[samples.label(n) for n in range(30)]]
    assert evaluate(EVALUATORS["knn"], configs.knn(source=source, k=5), Pictures(table))["unreadable_images"] == 2


@pytest.mark.parametrize(
    "options, label, message",
    [
        ({"split": "train"}, samples.label, 'train_split "train" and split "train" are the same data'),
        ({}, lambda n: n % 2 * 7, r'split "train" has the one class 0: nothing to tell apart'),
        (
            {},
            lambda n: 9 if n == 5 else n // 10,
            r'record .*:3. of split "test" is of class 9, which never occurs in spl',
        ),
        ({}, lambda n: -1 if n == 4 else n // 10, r"record .*:3. has no label, which is a whole number; where classes"),
        ({"class_caption": "kind"}, samples.label, r"record .*:1. has no caption in kind"),
    ],
)
def test_data_that_will_not_do_are_one_line(tmp_path, options, label, message):
    source = write_splits(tmp_path, label=label)
    with pytest.raises(UserError, match=message) as error:
        opened(source, **options)
    assert "\n" not in str(error.value)


def test_every_record_that_is_read_at_the_start_is_a_sign_of_life(tmp_path):
    beats = []
    Evaluation({"knn": configs.knn(source=write_splits(tmp_path), k=1)}, lambda: beats.append(1))
    assert len(beats) == samples.COUNT


@pytest.mark.parametrize(
    "kind, key, value, message",
    [
        ("knn", "k", 0, "evaluators.e.k: 0 is less than 1"),
        ("knn", "temperature", 0.0, "evaluators.e.temperature: 0.0 is not positive"),
        ("linear_probe", "l2", -1.0, "evaluators.e.l2: -1.0 is less than 0"),
        ("linear_probe", "max_iterations", 0, "evaluators.e.max_iterations: 0 is less than 1"),
        ("few_shot", "l2", 0.0, "evaluators.e.l2: 0.0 is not positive"),
        ("few_shot", "seeds", 0, "evaluators.e.seeds: 0 is less than 1"),
        ("few_shot", "shots", (5, 1), r"evaluators.e.shots: \(5, 1\) are no ascending numbers of at least 1"),
        ("few_shot", "shots", (), r"evaluators.e.shots: \(\) are no ascending"),
        ("few_shot", "shots", (0, 1), r"evaluators.e.shots: \(0, 1\) are no ascending"),
        ("few_shot", "shots", ("a",), "holds something else than numbers"),
    ],
)
def test_a_mistake_in_the_config_names_its_key(kind, key, value, message):
    config = tiny.get_config()
    config.evaluators.e = KINDS[kind].copy_and_resolve_references()
    validate(config, 8)
    config.evaluators.e[key] = value
    with pytest.raises(UserError, match=message):
        validate(config, 8)


def test_a_pooling_that_nothing_trains_is_refused():
    config = tiny.get_config()
    config.model.decoder, config.evaluators = configs.decoder(depth=1), {}
    config.evaluators.e = KINDS["knn"].copy_and_resolve_references()
    config.objectives = {"captioning": configs.objective(kind="captioning")}
    with pytest.raises(
        UserError, match='image.pooling: evaluators.e reads "map", which no objective trains; use "mean"'
    ):
        validate(config, 8)
    config.model.encoders.image.pooling = "mean"
    validate(config, 8)
