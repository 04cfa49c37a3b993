"""The losses that go round the devices against the plain formulas on one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mmjax.objectives import ring
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import batch_sharding

pytestmark = pytest.mark.sharding
MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 2, 1)]


def plain_sigmoid(image, text, scale, bias, _):
    logits = scale * image @ text.T + bias
    signs = 2 * jnp.eye(len(image)) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum() / len(image), accuracy(logits)


def plain_softmax(image, text, scale, bias, _):
    logits = scale * image @ text.T
    own = jnp.diagonal(jax.nn.log_softmax(logits, axis=0) + jax.nn.log_softmax(logits, axis=1))
    return -own.mean() / 2, accuracy(logits)


def plain_soft_targets(image, text, scale, bias, teacher):
    logits, (images, texts, teacher_scale) = scale * image @ text.T, jax.lax.stop_gradient(teacher)
    cross_entropy = divergence = 0.0
    for axis in (0, 1):
        student, target = (jax.nn.log_softmax(x, axis) for x in (logits, teacher_scale * images @ texts.T))
        cross_entropy -= (jnp.exp(target) * student).sum() / len(image) / 2
        divergence += (jnp.exp(target) * (target - student)).sum() / len(image) / 2
    return cross_entropy, divergence


def accuracy(logits):
    return (jnp.diagonal(logits) >= logits.max(axis=1)).mean()


def teacher_of(image, text, scale):
    """Another width and other similarities than the student's; made from them, so that a gradient into it is seen."""
    return jnp.hstack([image, image**2]), jnp.hstack([text, -(text**3)]), 0.5 * scale


def ring_softmax(image, text, scale, bias, chunk, valid=None):
    return ring.softmax(image, text, scale, chunk, valid)


def ring_soft_targets(image, text, scale, bias, chunk, valid=None):
    return ring.soft_targets(image, text, scale, teacher_of(image, text, scale), chunk, valid)


LOSSES = {
    "sigmoid": (plain_sigmoid, ring.sigmoid),
    "softmax": (plain_softmax, ring_softmax),
    "soft_targets": (plain_soft_targets, ring_soft_targets),
}


def embeddings(seed, rows, width):
    image, text = np.random.default_rng(seed).normal(size=(2, rows, width))
    text += image  # pairs are alike, so that accuracy is not 0
    return [jnp.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (image, text)]


def on_mesh(mesh, function, image, text, scale, bias, *valid):
    """(value, share), gradients of 3 x the value; the rows lie over the mesh."""

    def tripled(*arguments):
        value, share = function(*arguments)
        return 3 * value, share

    with jax.set_mesh(mesh):
        image, text, *valid = (jax.device_put(x, batch_sharding(mesh)) for x in (image, text, *valid))
        differentiate = jax.jit(jax.value_and_grad(tripled, (0, 1, 2, 3), has_aux=True))
        return jax.device_get(differentiate(image, text, scale, bias, *valid))


def on_some_rows(plain, rows, image, text, scale, bias):
    image, text = image[rows], text[rows]
    return plain(image, text, scale, bias, teacher_of(image, text, scale))


def check(kind, shape, image, text, scale, bias, chunk, valid=None):
    plain, around = LOSSES[kind]
    arguments = image, text, jnp.float32(scale), jnp.float32(bias)
    rows = np.arange(len(image)) if valid is None else np.flatnonzero(valid)
    if len(rows):
        one = make_mesh(devices=jax.devices()[:1])
        expected, expected_gradients = on_mesh(one, partial(on_some_rows, plain, rows), *arguments)
    else:
        expected, expected_gradients = (0, 0), [np.zeros(x.shape) for x in arguments]
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    around = partial(around, chunk=chunk)
    if valid is None:
        value, gradients = on_mesh(mesh, around, *arguments)
    else:
        value, gradients = on_mesh(mesh, lambda *x: around(*x[:4], valid=x[4]), *arguments, valid)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for name, ours, theirs in zip(("image", "text", "scale", "bias"), gradients, expected_gradients, strict=True):
        # A logit is rounded in proportion to the scale, and so is its exponential; times the scale that is a gradient.
        allowed = 1e-5 * np.linalg.norm(theirs) + 1e-6 + 1e-7 * scale**2
        assert np.linalg.norm(ours - theirs) <= allowed, (name, ours, theirs)


@pytest.mark.slow
@settings(deadline=None, max_examples=30, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    kind=st.sampled_from(sorted(LOSSES)),
    shape=st.sampled_from(MESHES),
    rows=st.integers(1, 6),
    width=st.integers(1, 9),
    chunk=st.integers(0, 7),
    scale=st.floats(0.1, 100),
    bias=st.floats(-20, 5),
    missing=st.sampled_from((None, 0.3, 0.8)),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_plain_formula(
    kind, shape, rows, width, chunk, scale, bias, missing, seed
):
    image, text = embeddings(seed, rows * shape[0] * shape[1], width)
    valid = None if missing is None else np.random.default_rng(seed).random(len(image)) >= missing
    check(kind, shape, image, text, scale, bias, chunk, valid)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("texts", [range(5, 20), [7], []], ids=["none on the first device", "one", "none at all"])
def test_rows_that_are_not_valid_take_no_part(kind, shape, texts):
    image, text = embeddings(2, 20, 8)
    check(kind, shape, image, text, 20.0, -5.0, 3, np.isin(np.arange(20), texts))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape, chunks", [((2, 2, 2), (1, 2, 3, 4, 5, 9)), ((1, 1, 1), (0, 7, 13, 20))])
def test_any_number_of_texts_at_a_time_gives_the_same(kind, shape, chunks):
    image, text = embeddings(0, 20, 8)
    for chunk in chunks:
        check(kind, shape, image, text, 20.0, -5.0, chunk)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_value_is_the_same_without_its_gradient(kind):
    image, text = embeddings(1, 16, 8)
    mesh = make_mesh(4, 2)
    loss = partial(LOSSES[kind][1], scale=jnp.float32(9), bias=jnp.float32(-3), chunk=1)
    with jax.set_mesh(mesh):
        alone = jax.jit(loss)(image, text)
        beside, gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(image, text)
    np.testing.assert_allclose(alone, beside, rtol=1e-6)
    assert gradient.sharding.is_equivalent_to(batch_sharding(mesh), 2)  # rows stay on their devices


@pytest.mark.parametrize("kind", LOSSES)
def test_memory_grows_with_the_rows_of_a_device_and_not_with_their_square(kind):
    mesh = make_mesh(8)

    def temporaries(rows):
        shape = jax.ShapeDtypeStruct((rows, 8), jnp.float32, sharding=batch_sharding(mesh))
        loss = partial(LOSSES[kind][1], scale=jnp.float32(10), bias=jnp.float32(-10), chunk=32)
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large < 4.5 * small
    assert large < 4 * 2048 * 2048  # one device's rows against another's, as bytes of float32 would be 4 x this


def test_without_a_mesh_the_error_says_so():
    image, text = embeddings(0, 4, 2)
    with pytest.raises(ValueError, match="no mesh is set"):
        ring.sigmoid(image, text, jnp.float32(1), jnp.float32(0))
