"""Exact ties, whatever the chunks, and several own items for a query."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.evaluators import ranking
from tests.evaluators import make_goldens_zeroshot as goldens


def brute_force(queries, gallery, query_owners, item_owners, count):
    """Sorts every row, own items last among equals."""
    found = np.full((len(queries), count), -1)
    for row, (query, owner) in enumerate(zip(queries, query_owners, strict=True)):
        scores, own = gallery @ query, item_owners == owner
        order = sorted(range(len(gallery)), key=lambda item, scores=scores, own=own: (-scores[item], own[item]))
        places = [place for place, item in enumerate(order) if own[item]][:count]
        found[row, : len(places)] = np.array(places) - np.arange(len(places))
    return found


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 9),
    items=st.integers(1, 15),
    owners=st.integers(1, 4),
    count=st.integers(1, 12),
    chunk=st.integers(1, 16),
    seed=st.integers(0, 9999),
)
def test_rivals_equal_a_full_sort_in_both_directions(rows, items, owners, count, chunk, seed):
    rng = np.random.default_rng(seed)
    # Small whole numbers: exact products, and many ties.
    queries, gallery = (rng.integers(-2, 3, (size, 3)).astype(np.float32) for size in (rows, items))
    query_owners, item_owners = rng.integers(0, owners, rows), rng.integers(0, owners, items)
    before, ranking.CHUNK = ranking.CHUNK, chunk
    try:
        forth, back = ranking.rivals(queries, gallery, query_owners, item_owners, count, both=True)
        alone, nothing = ranking.rivals(queries, gallery, query_owners, item_owners, count)
    finally:
        ranking.CHUNK = before
    for found, arguments in (
        (forth, (queries, gallery, query_owners, item_owners)),
        (back, (gallery, queries, item_owners, query_owners)),
    ):
        expected = brute_force(*arguments, count)
        np.testing.assert_array_equal(found, expected[:, : found.shape[1]])
        assert (expected[:, found.shape[1] :] == -1).all()
    np.testing.assert_array_equal(alone, forth)
    assert nothing.shape == (items, 0)


@pytest.mark.parametrize("count", [50, 1025])
def test_copies_of_any_vector_tie_wherever_they_stand(count):
    """A float32 product puts some of them before others."""
    vector = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    same, owners = np.repeat(vector / np.linalg.norm(vector), count, axis=0), np.arange(count)
    assert (ranking.ranks(same, same.copy(), owners, owners) == count - 1).all()


def test_real_numbers_too_depend_on_no_chunks_and_come_in_the_right_order():
    rng = np.random.default_rng(0)
    queries, gallery = (goldens.unit(rng.normal(size=(size, 64))) for size in (300, 200))
    gallery[100:150] = gallery[:50]
    owners, item_owners = rng.integers(0, 40, 300), np.arange(200) % 40
    before, found = ranking.CHUNK, []
    try:
        for ranking.CHUNK in (48, 64, 1024):
            found.append(ranking.rivals(queries, gallery, owners, item_owners, both=True))
    finally:
        ranking.CHUNK = before
    for other in found[1:]:
        assert all(np.array_equal(*pair) for pair in zip(found[0], other, strict=True))
    exact = [gallery.astype(np.float64) @ query.astype(np.float64) for query in queries]
    first = [(item_owners[scores.argmax()] == owner) for scores, owner in zip(exact, owners, strict=True)]
    assert (found[0][0][:, 0] == 0).sum() <= sum(first) <= (found[0][0][:, 0] <= 1).sum()


def test_a_nan_earns_nothing():
    eye, owners = np.eye(20, dtype=np.float32), np.arange(20)
    spoilt = eye.copy()
    spoilt[3], spoilt[5, 5] = np.nan, np.inf
    expected = np.where(np.isin(owners, (3, 5)), 19, 2)  # two that are worth nothing come before the others
    np.testing.assert_array_equal(ranking.ranks(eye, spoilt, owners, owners), expected)
    np.testing.assert_array_equal(ranking.ranks(spoilt, eye, owners, owners), np.where(expected == 2, 0, 19))
    both = ranking.rivals(eye, np.concatenate([spoilt, eye]), owners, np.tile(owners, 2))[0]
    assert both.shape == (20, 2) and both[3].tolist() == [1, 38] and both[0].tolist() == [2, 2]


@pytest.mark.parametrize("name", goldens.SEARCHES)
def test_average_precision_is_scikit_learns_over_the_first_ten(name):
    expected = json.loads(goldens.PATH.read_text())[name]
    found = ranking.average_precision(ranking.rivals(*goldens.search(*goldens.SEARCHES[name]))[0])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(set(expected)) > 5 and 0 < np.mean(expected) < 1


@pytest.mark.parametrize(
    "rivals, expected",
    [
        ([0, 0, 0], 1.0),
        ([0, -1, -1], 1.0),
        ([1, 1, -1], (1 / 2 + 2 / 3) / 2),
        ([9, -1, -1], 0.1),
        ([10, -1, -1], 0.0),
        ([0, 9, 9], 1 / 3),  # the second would be in place 11
        ([0] * 10, 1.0),
    ],
)
def test_average_precision_of_known_places(rivals, expected):
    assert ranking.average_precision(np.array([rivals])) == pytest.approx([expected])
