"""Few-shot regression against scikit-learn, and how its images are chosen."""

import json

import numpy as np
import pytest

from mmjax import config as configs
from mmjax.evaluators import FewShot, few_shot
from mmjax.evaluators.labelled import Split, places_in_class
from tests.data import samples
from tests.evaluators.make_goldens_labelled import CLASSES, GOLDENS, SHOWN, splits
from tests.evaluators.pictures import Pictures, evaluate, write_splits


@pytest.mark.parametrize(
    "golden", json.loads(GOLDENS.read_text())["few_shot"], ids=lambda golden: str(golden["images"])
)
def test_scores_are_those_of_scikit_learn(golden):
    (train, labels), (test, wanted) = splits()
    count = golden["images"]
    weights, bias = few_shot.fit(Split(train[:count], labels[:count]), CLASSES, golden["l2"])
    scores = test @ weights + bias
    np.testing.assert_allclose(scores[:SHOWN], golden["scores"], atol=1e-6)
    assert (scores.argmax(axis=1) == wanted).mean() == pytest.approx(golden["top1"])


def test_seeds_draw_an_order_of_each_class():
    labels = np.random.default_rng(0).choice(4, 60, p=[0.6, 0.2, 0.15, 0.05])
    places = [places_in_class(labels, seed) for seed in (0, 0, 1)]
    for number in range(4):
        assert sorted(places[0][labels == number]) == [*range((labels == number).sum())]
    assert (places[0] == places[1]).all() and (places[0] != places[2]).any()


def test_shots_are_so_many_of_each_class_or_all_that_there_are(tmp_path, monkeypatch):
    """And nothing but what is drawn is encoded."""
    source = write_splits(tmp_path, train=range(0, 30, 2), label=lambda n: int(n >= 26))  # 13 images, and 2
    model, fitted = Pictures(np.random.default_rng(0).normal(size=(30, 3))), []
    fit = few_shot.fit

    def spy(train, classes, l2):
        fitted.append((np.bincount(train.labels).tolist(), train.features))
        return fit(train, classes, l2)

    monkeypatch.setattr(few_shot, "fit", spy)
    metrics = evaluate(FewShot, configs.few_shot(source=source, shots=(1, 4), seeds=2), model)
    assert [counts for counts, _ in fitted] == [[1, 1], [1, 1], [4, 2], [4, 2]]
    assert (fitted[2][1] != fitted[3][1]).any()
    assert set(metrics) == {f"few_shot_{n}_top1{end}" for n in (1, 4) for end in ("", "_std")}
    assert len(model.seen[0]) < 15 and len(model.seen[1]) == 15
    again = evaluate(FewShot, configs.few_shot(source=source, shots=(1, 4), seeds=2), model)
    assert again == metrics


def test_the_evaluator_reports_mean_and_deviation_over_seeds(tmp_path):
    source, rng = write_splits(tmp_path), np.random.default_rng(0)
    labels = np.array([samples.label(n) for n in range(30)])
    apart = np.eye(2)[labels] + 0.01 * rng.normal(size=(30, 2))
    entry = configs.few_shot(source=source, shots=(2,), seeds=3, l2=1.0)
    assert evaluate(FewShot, entry, Pictures(apart)) == {"few_shot_2_top1": 1.0, "few_shot_2_top1_std": 0.0}
    mixed = np.eye(2)[labels] + 1.0 * rng.normal(size=(30, 2))
    found = evaluate(FewShot, entry, Pictures(mixed))
    assert 0.3 < found["few_shot_2_top1"] < 1 and found["few_shot_2_top1_std"] > 0
    assert evaluate(FewShot, entry, Pictures(apart * np.nan))["few_shot_2_top1"] == 0
