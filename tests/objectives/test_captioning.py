"""Captioning: what each slot of the decoder sees, and which tokens count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.models.multimodal import Text
from mmjax.models.outputs import Outputs
from mmjax.objectives import captioning
from tests.objectives import peer_cases as cases

LENGTH, ROWS, VOCAB = cases.LENGTH, cases.ROWS, cases.VOCAB


def build(depth=1, **settings):
    """A model with a causal text tower; image tokens are given."""
    return cases.build(
        ("text", "decoder"),
        {"depth": 1, "causal": True, "pooling": "last", "projection": False},
        decoder=configs.decoder(depth=depth, **settings),
    )


def first_weights(module, batch):
    def read(module, ids, image):
        text = Text(ids, *module.tokens("text", ids))
        return module.caption(text, image, jnp.zeros(len(ids), bool) if module.parallel else None)

    shapes = cases.shapes_of(module, batch["text"], batch["image"], method=read)
    return cases.as_tree(cases.draw_weights(shapes, 0))


def logits_of(module, weights):
    """Compiled: logits of texts and image tokens."""

    def logits(ids, image, parallel=None):
        outputs = Outputs(module, weights, {"text": ids}, {"image": {"tokens": image}})
        return outputs.caption(outputs.text, image, parallel)

    return jax.jit(logits)


@pytest.fixture
def batch():
    return cases.texts_and_images(0) | {"rng": cases.keys()}


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("image_input", ["cross", "prefix"])
@pytest.mark.parametrize("reads", ["embedding", "text"])
def test_a_slot_sees_the_image_and_the_tokens_before_the_one_it_predicts(reads, image_input, start, batch, mesh):
    # In the second layer a text would also come back from image tokens that have seen it.
    module = build(depth=2, reads=reads, image=image_input, start=start)
    logits = logits_of(module, first_weights(module, batch))
    ids, image = batch["text"], batch["image"]
    expected = logits(ids, image)
    assert expected.shape == (ROWS, LENGTH - (not start), VOCAB)

    def changed(other):
        """[row, slot]: by how much the logits differ."""
        return np.abs(np.asarray(other) - np.asarray(expected)).max(axis=2)

    assert changed(logits(ids, image + 0.5)).min() > 1e-3
    for place in range(LENGTH):
        other = ids.copy()
        other[:, place] = VOCAB - 1 - other[:, place]
        difference = changed(logits(other, image))
        predicts_it = place if start else place - 1  # the slot that predicts this token
        assert difference[:, : predicts_it + 1].max(initial=0) < 1e-5
        assert difference[:, predicts_it + 1 :].min(initial=1) > 1e-4


def test_parallel_rows_see_no_text(batch, mesh):
    module = build(reads="embedding").clone(parallel=True)
    logits = logits_of(module, first_weights(module, batch))
    ids, image, at_once = batch["text"], batch["image"], np.arange(ROWS) < 3
    ours, other = (np.asarray(logits(x, image, at_once)) for x in (ids, VOCAB - 1 - ids))
    np.testing.assert_allclose(ours[:3], other[:3], atol=1e-6)
    assert np.abs(ours[3:, 1:] - other[3:, 1:]).max(axis=2).min() > 1e-3
    assert np.abs(ours[:3] - np.asarray(logits(ids, -image, at_once))[:3]).max(axis=2).min() > 1e-3
    assert np.abs(np.diff(ours[:3], axis=1)).max(axis=2).min() > 1e-3  # each slot knows its place
    # Rows beside them are as in a batch without any.
    alone = logits(ids, image, np.zeros(ROWS, bool))
    np.testing.assert_allclose(ours[3:], alone[3:], atol=1e-5)


class Given(dict):
    """Outputs with these logits for the texts, whatever the image."""

    text, pad_id = None, cases.PAD

    def __init__(self, logits):
        super().__init__(image={"tokens": None})
        self.logits = logits

    def caption(self, text, image, parallel):
        self.parallel = parallel
        return self.logits


@pytest.mark.parametrize("slots", [LENGTH, LENGTH - 1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_tokens_that_are_no_padding(label_smoothing, slots, batch):
    logits = 3 * cases.draw(0).normal(size=(ROWS, slots, VOCAB))
    (loss, metrics), gradient = jax.value_and_grad(
        lambda x: captioning.captioning(Given(x), batch, None, label_smoothing=label_smoothing), has_aux=True
    )(jnp.float32(logits))
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    labels = batch["text"][:, LENGTH - slots :]
    wanted = (1 - label_smoothing) * np.eye(VOCAB)[labels] + label_smoothing / VOCAB
    counted = labels != cases.PAD
    assert float(loss) == pytest.approx(-(wanted * log_probabilities).sum(axis=-1)[counted].mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(axis=-1) == labels)[counted].mean())
    assert metrics["count"] == counted.sum()
    np.testing.assert_array_equal(np.any(gradient, axis=2), counted)


def test_without_any_text_loss_and_gradient_are_zero(batch):
    (loss, metrics), gradient = jax.value_and_grad(
        lambda x: captioning.captioning(Given(x), batch | {"has_text": jnp.zeros(ROWS, bool)}, None), has_aux=True
    )(jnp.ones((ROWS, LENGTH, VOCAB)))
    assert (loss, metrics["count"]) == (0, 0)
    assert not np.any(gradient)


def test_parallel_is_the_share_of_rows_that_are_predicted_at_once():
    outputs = Given(jnp.zeros((3000, 1, 5)))
    keys = jax.random.split(jax.random.key(1), 3000)
    captioning.captioning(outputs, {"text": jnp.ones((3000, 2), int), "rng": keys}, None, parallel=0.75)
    assert float(outputs.parallel.mean()) == pytest.approx(0.75, abs=0.03)
    captioning.captioning(outputs, {"text": jnp.ones((3000, 2), int), "rng": keys}, None)
    assert outputs.parallel is None


def test_rows_without_a_text_leave_no_trace(batch, mesh):
    module = build(reads="embedding").clone(parallel=True)
    missing = np.array([False, True, False, False, True, False])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(weights, batch):
        outputs = Outputs(module, weights, batch, {"image": {"tokens": batch["image"]}})
        return captioning.captioning(outputs, batch, None, parallel=0.5)

    weights = first_weights(module, batch)
    there = {name: value[~missing] for name, value in batch.items()}
    cases.assert_close(run(weights, batch | {"has_text": ~missing}), run(weights, there))
