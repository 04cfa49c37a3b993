import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from mmjax import config as configs
from mmjax.objectives import OBJECTIVES
from mmjax.sharding.mesh import make_mesh


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def reference_sigmoid(image, text, scale, bias):
    """SigLIP, algorithm 1, as it is printed: a sum over pairs of -log sigmoid(label * logit)."""
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            label = 1 if i == j else -1
            total += np.log1p(np.exp(-label * (scale * image[i] @ text[j] + bias)))
    return total / len(image)


def reference_softmax(image, text, scale, bias):
    """CLIP, figure 3: cross-entropy of the rows and of the columns, averaged."""

    def cross_entropy(logits):
        return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)])

    logits = scale * image @ text.T
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def outputs(image, text, scale, bias):
    return {
        "image": {"embedding": image},
        "text": {"embedding": text},
        "logit_scale": jnp.float32(scale),
        "logit_bias": jnp.float32(bias),
    }


@partial(jax.jit, static_argnums=0)
def evaluate(name, outputs, **batch):
    return OBJECTIVES[name].run(outputs, batch, jax.random.key(0))


def test_the_config_knows_the_options_of_every_objective():
    assert configs.OBJECTIVES.keys() == OBJECTIVES.keys()
    for kind, options in configs.OBJECTIVES.items():
        assert list(inspect.signature(OBJECTIVES[kind].run).parameters) == ["outputs", "batch", "rng", *options]


@pytest.mark.parametrize("name, reference", [("sigmoid", reference_sigmoid), ("softmax", reference_softmax)])
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 9), width=st.integers(2, 8), scale=st.floats(1, 20), seed=st.integers(0, 1000))
def test_losses_are_the_published_formulas(name, reference, rows, width, scale, seed):
    rng = np.random.default_rng(seed)
    image, text = unit(rng, rows, width), unit(rng, rows, width)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        loss, _ = evaluate(name, outputs(jnp.float32(image), jnp.float32(text), scale, -10.0))
    assert float(loss) == pytest.approx(reference(image, text, scale, -10.0), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_gradients_agree_with_finite_differences(mesh, name):
    rng = np.random.default_rng(0)
    image, text = jnp.float32(unit(rng, 5, 4)), jnp.float32(unit(rng, 5, 4))

    def loss(image, text, scale, bias):
        return evaluate(name, outputs(image, text, scale, bias))[0]

    check_grads(loss, (image, text, 5.0, -2.0), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_accuracy_counts_images_that_prefer_their_own_text(mesh):
    image = jnp.eye(4)
    _, metrics = evaluate("softmax", outputs(image, image, 10, 0))
    assert metrics["batch_accuracy"] == 1.0
    _, metrics = evaluate("softmax", outputs(image, image[::-1], 10, 0))
    assert metrics["batch_accuracy"] == 0.0


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_rows_without_text_are_left_out(mesh, name):
    rng = np.random.default_rng(1)
    image, text = jnp.float32(unit(rng, 6, 4)), jnp.float32(unit(rng, 6, 4))
    some, rows = jnp.array([True, False, True, True, False, True]), np.array([0, 2, 3, 5])
    loss, metrics = evaluate(name, outputs(image, text, 9, -3), has_text=some)
    expected, expected_metrics = evaluate(name, outputs(image[rows], text[rows], 9, -3))
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert metrics["batch_accuracy"] == pytest.approx(float(expected_metrics["batch_accuracy"]))
