"""Nearest neighbours against brute force and against scikit-learn."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.evaluators import Knn, knn
from mmjax.sharding.mesh import make_mesh
from tests.data import samples
from tests.evaluators.make_goldens_labelled import CLASSES, GOLDENS, SHOWN, splits
from tests.evaluators.pictures import Pictures, evaluate, write_splits


@pytest.mark.parametrize("golden", json.loads(GOLDENS.read_text())["knn"], ids=lambda golden: f"k={golden['k']}")
@pytest.mark.parametrize("devices", [1, 8])
def test_votes_are_those_of_scikit_learn(monkeypatch, golden, devices):
    monkeypatch.setattr(knn, "QUERIES", 32)
    monkeypatch.setattr(knn, "GALLERY", 64)  # less than k = 45 in the last chunk, and more than one chunk of each
    (train, labels), (test, wanted) = splits()
    mesh = make_mesh(devices=jax.devices()[:devices])
    similarities, found = knn.nearest(knn._unit(test), knn._unit(train), golden["k"], mesh)
    votes = knn.weigh(similarities, labels[found], CLASSES, golden["temperature"])
    np.testing.assert_allclose(votes[:SHOWN], golden["shares"], atol=1e-5)
    assert (votes.argmax(axis=1) == wanted).mean() == pytest.approx(golden["top1"])
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (test, train)]
    order = np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")[:, : golden["k"]]
    assert (np.sort(found) == np.sort(order)).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 9999), k=st.integers(1, 4))
def test_of_equal_images_the_first_are_the_nearest(seed, k):
    """Small whole numbers: exact products, and many ties. The shapes are few, so that little is compiled."""
    rng = np.random.default_rng(seed)
    queries, gallery = (rng.integers(-1, 2, (rows, 2)).astype(np.float32) for rows in (5, 7))
    before, knn.GALLERY = knn.GALLERY, 4
    try:
        similarities, found = knn.nearest(queries, gallery, k, make_mesh(devices=jax.devices()[:1]))
    finally:
        knn.GALLERY = before
    expected = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(similarities, np.take_along_axis(queries @ gallery.T, expected, axis=1))


def test_the_nearer_neighbours_outweigh_the_more_numerous():
    similarities, labels = np.array([[0.9, 0.5, 0.5]]), np.array([[1, 0, 0]])
    assert knn.weigh(similarities, labels, 2, 0.07).argmax() == 1
    assert knn.weigh(similarities, labels, 2, 10.0).argmax() == 0


def test_the_evaluator_counts_what_it_finds(tmp_path):
    source = write_splits(tmp_path)
    angles = np.array([samples.label(n) + 0.01 * n for n in range(30)])
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.linspace(1, 9, 30)[:, None]
    assert evaluate(Knn, configs.knn(source=source, k=5), Pictures(table)) == {"knn_top1": 1.0}
    table[[1, 3, 17]] = table[[28, 28, 0]]
    assert evaluate(Knn, configs.knn(source=source, k=5), Pictures(table)) == {"knn_top1": pytest.approx(12 / 15)}
    assert evaluate(Knn, configs.knn(source=source, k=5), Pictures(table * np.nan)) == {"knn_top1": 0.0}
    with pytest.raises(UserError, match='k: split "train" has 15 images, not 16'):
        Knn(configs.knn(source=source, k=16)).open()
