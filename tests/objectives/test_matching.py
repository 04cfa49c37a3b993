"""Image-text matching: which wrong pairs are drawn, and what rows without a text leave behind."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.models.outputs import Outputs
from mmjax.objectives import matching
from tests.objectives import peer_cases as cases

ROWS = 6
MISSING = np.array([False, False, True, False, True, False])
TOWER = configs.image_encoder(**cases.SIZES | {"variant": "Ti/14"}, depth=1, image_size=28)
MODEL = cases.build(
    ("image", "text", "fusion", "matching"),
    {"depth": 1, "mask_padding": True, "pooling": "mean"},
    encoders={"image": TOWER},
    fusion=configs.fusion(depth=1),
    embed_dim=16,
)
random_columns = jax.jit(jax.vmap(matching.draw, in_axes=(0, None, None)))


def make_batch(missing=None):
    """Rows that are `missing` have no text."""
    random = cases.draw(0)
    text, image = cases.texts(random), random.randint(0, 256, size=(ROWS, 28, 28, 3)).astype(np.uint8)
    if missing is None:
        return {"text": text, "image": image}
    return {"text": np.where(missing[:, None], cases.PAD, text), "image": image, "has_text": ~missing}


@pytest.fixture
def weights(mesh):
    return cases.as_tree(cases.draw_weights(cases.shapes_of(MODEL, make_batch()), 0))


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def run(weights, batch):
    """The most similar wrong row is the one that is drawn, because similarities are scaled up."""
    keys = jax.random.split(jax.random.key(0), len(batch["text"]))
    outputs = Outputs(MODEL, weights, batch, {"logit_scale": jnp.float32(1e6)})
    return matching.matching(outputs, {**batch, "rng": keys}, None)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.0, 5.0, 1e6]), with_missing=st.booleans())
def test_what_is_drawn_is_neither_the_pair_itself_nor_a_row_with_the_same_text(seed, scale, with_missing):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 2, size=(ROWS, 2))
    has_text = random.random(ROWS) < 0.6 if with_missing else np.ones(ROWS, bool)
    usable = matching.wrong_pairs(jnp.asarray(ids), jnp.asarray(has_text) if with_missing else None)
    # The pairs themselves are the most similar.
    similarity = scale * (jnp.float32(random.normal(size=(ROWS, ROWS))) + 10 * jnp.eye(ROWS))
    keys = jax.random.split(jax.random.key(seed), (20, ROWS))
    columns = np.asarray(random_columns(keys, similarity, usable))
    for row in range(ROWS):
        others = [
            column for column in range(ROWS) if (ids[column] != ids[row]).any() and has_text[row] and has_text[column]
        ]
        assert np.flatnonzero(usable[row]).tolist() == others
        assert not others or set(columns[:, row]) <= set(others)


def test_harder_rows_are_drawn_more_often():
    similarity = jnp.array([[9.0, 0.0, 1.0, 2.0, 5.0]] * 2)
    usable = jnp.array([[False, True, True, True, False]] * 2)
    columns = np.asarray(random_columns(jax.random.split(jax.random.key(0), (4000, 2)), similarity, usable))
    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    for row in (0, 1):
        shares = np.bincount(columns[:, row], minlength=5) / 4000
        np.testing.assert_allclose(shares, [0, *expected, 0], atol=0.03)
    assert (columns[:, 0] != columns[:, 1]).any()  # the same row draws by its own key


def test_similarity_chooses_pairs_and_learns_nothing(weights):
    (loss, metrics), gradient = run(weights, make_batch())
    assert np.isfinite(loss) and 0 <= metrics["accuracy"] <= 1 and metrics["count"] == 3 * ROWS
    moved = {path for path, value in flatten_dict(gradient, sep="/").items() if np.any(value)}
    assert "image/patches/patch_embed/kernel" in moved and "fusion/match_head/kernel" in moved
    assert not any(path.startswith(("image_projection", "text_projection", "logit", "image/pool")) for path in moved)


def test_rows_without_a_text_leave_no_trace(weights):
    batch = make_batch(MISSING)
    with_them = run(weights, batch)
    cases.assert_close(with_them, run(weights, {name: batch[name][~MISSING] for name in ("text", "image")}))
    assert with_them[0][1]["count"] == 3 * (~MISSING).sum()


def test_the_same_text_everywhere_leaves_the_pairs_themselves(weights):
    batch = make_batch(np.zeros(ROWS, bool))
    (loss, metrics), _ = run(weights, batch | {"text": np.repeat(batch["text"][:1], ROWS, axis=0)})
    assert metrics["count"] == ROWS
    assert np.isfinite(loss) and loss > 0


def test_without_any_text_loss_and_gradient_are_zero(weights):
    (loss, metrics), gradient = run(weights, make_batch(np.ones(ROWS, bool)))
    assert (loss, metrics["count"]) == (0, 0)
    assert not any(np.any(value) for value in jax.tree.leaves(gradient))
