"""The linear probe against scikit-learn, and its search for the penalty."""

import json

import jax
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.evaluators import LinearProbe, linear_probe
from mmjax.evaluators.labelled import Split
from mmjax.sharding.mesh import make_mesh
from tests.data import samples
from tests.evaluators.make_goldens_labelled import CLASSES, GOLDENS, SHOWN, splits
from tests.evaluators.pictures import Pictures, evaluate, write_splits


@pytest.fixture(scope="module", params=[1, 8])
def regression(request):
    mesh = make_mesh(devices=jax.devices()[: request.param])
    return linear_probe.Regression(Split(*splits()[0]), CLASSES, mesh)


def log_softmax(scores):
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    "golden", json.loads(GOLDENS.read_text())["linear_probe"], ids=lambda golden: f"{golden['l2']}"
)
def test_the_optimum_is_that_of_scikit_learn(regression, golden):
    (train, labels), (test, wanted) = splits()
    weights = regression.fit(golden["l2"]).astype(np.float64)
    own = log_softmax(linear_probe.scores(weights, train))[np.arange(len(train)), labels]
    loss = -own.sum() + golden["l2"] / 2 * (weights[:-1] ** 2).sum()
    assert loss == pytest.approx(golden["loss"], rel=1e-6)
    scores = linear_probe.scores(weights, test)
    tolerance = 1e-4 if golden["l2"] >= 1 else 1e-3  # hardly penalised, the minimum is flat
    np.testing.assert_allclose(np.exp(log_softmax(scores))[:SHOWN], golden["probabilities"], atol=tolerance)
    assert (scores.argmax(axis=1) == wanted).mean() == pytest.approx(golden["top1"])


def test_only_what_is_used_counts(regression):
    (train, labels), _ = splits()
    used = np.arange(len(train)) % 3 > 0
    alone = linear_probe.Regression(Split(train[used], labels[used]), CLASSES, regression._mesh)
    np.testing.assert_allclose(regression.fit(1.0, used), alone.fit(1.0), rtol=1e-3, atol=1e-3)
    assert np.abs(regression.fit(1.0, used) - regression.fit(1.0)).max() > 0.01


def test_iterations_are_limited(regression):
    beats = []
    limited = linear_probe.Regression(Split(*splits()[0]), CLASSES, regression._mesh, 3, lambda: beats.append(1))
    assert np.abs(limited.fit(0.01) - regression.fit(0.01)).max() > 0.01
    assert beats == [1]


@pytest.mark.parametrize("peak", [-6, -3.125, 0, 0.5, 6])
def test_the_search_finds_the_peak_in_fifteen_fits_of_eight_a_decade(peak):
    tried = []

    def score(l2):
        tried.append(l2)
        return -abs(np.log10(l2) - peak)

    assert linear_probe.search(score) == pytest.approx(10**peak)
    assert len(tried) == len(set(tried)) <= 15
    assert linear_probe.search(lambda l2: 0.5) == 1e6  # of equals the largest


def test_the_evaluator_searches_on_a_part_of_the_training_images(tmp_path, monkeypatch):
    source, rng = write_splits(tmp_path), np.random.default_rng(0)
    labels = np.array([samples.label(n) for n in range(30)])
    model, used = Pictures(np.eye(2)[labels] + 0.2 * rng.normal(size=(30, 2))), []
    fit = linear_probe.Regression.fit

    def spy(self, l2, of=None):
        used.append(self._count if of is None else int(of.sum()))
        return fit(self, l2, of)

    monkeypatch.setattr(linear_probe.Regression, "fit", spy)
    metrics = evaluate(LinearProbe, configs.linear_probe(source=source), model)
    assert metrics["linear_probe_top1"] > 0.8 and 1e-6 <= metrics["linear_probe_l2"] <= 1e6
    assert used[-1] == 15 and set(used[:-1]) == {13} and len(used) > 10  # 8 and 7 images: one of each five is held out
    fixed = evaluate(LinearProbe, configs.linear_probe(source=source, l2=0.5), model)
    assert fixed["linear_probe_l2"] == 0.5
    nothing = evaluate(LinearProbe, configs.linear_probe(source=source, l2=0.5), Pictures(model.table * np.nan))
    assert nothing["linear_probe_top1"] == 0


def test_recall_is_a_mean_over_classes(tmp_path):
    """14 images of one class, of which one is wrong, and one image of the other."""
    source = write_splits(tmp_path, test=[*range(1, 15), 29])
    table = np.eye(2)[[samples.label(n) for n in range(30)]]
    table[3] = table[29]
    found = evaluate(LinearProbe, configs.linear_probe(source=source, l2=0.1), Pictures(table))
    assert found["linear_probe_top1"] == pytest.approx(14 / 15)
    assert found["linear_probe_mean_per_class_recall"] == pytest.approx((13 / 14 + 1) / 2)


def test_too_few_images_to_hold_one_out(tmp_path):
    source = write_splits(tmp_path, train=(0, 2, 26, 28))
    with pytest.raises(UserError, match='no class of split "train" has 5 images, to hold one out: set l2'):
        LinearProbe(configs.linear_probe(source=source)).open()
