"""A student against a teacher: plain formulas, gradients, rows without text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mmjax.errors import UserError
from mmjax.objectives import distillation
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import batch_sharding


def model(rng, rows, width, scale):
    modalities = {}
    for name in ("image", "text"):
        x = rng.normal(size=(rows, width))
        modalities[name] = {"embedding": jnp.float32(x / np.linalg.norm(x, axis=1, keepdims=True))}
    return modalities | {"logit_scale": jnp.float32(scale)}


def pair(seed, rows, width, teacher_width, scale=8.0):
    rng = np.random.default_rng(seed)
    return model(rng, rows, width, scale) | {"teacher": model(rng, rows, teacher_width, scale + 4)}


def of_rows(outputs, rows):
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, outputs)


def plain_similarity(outputs, temperature):
    """The cross-entropy and the divergence, each a mean over rows and both directions, times temperature^2."""

    def probabilities(model, axis):
        logits = model["logit_scale"] * model["image"]["embedding"] @ model["text"]["embedding"].T
        return jax.nn.softmax(logits / temperature, axis=axis)

    cross_entropy = divergence = 0.0
    for axis in (0, 1):
        student, target = probabilities(outputs, axis), jax.lax.stop_gradient(probabilities(outputs["teacher"], axis))
        cross_entropy += -(target * jnp.log(student)).sum(axis=axis).mean() / 2
        divergence += (target * jnp.log(target / student)).sum(axis=axis).mean() / 2
    return temperature**2 * cross_entropy, temperature**2 * divergence


def similarity(outputs, temperature=1.0, chunk=0, has_text=None):
    batch = {} if has_text is None else {"has_text": jnp.asarray(has_text)}
    loss, metrics = distillation.similarity(outputs, batch, jax.random.key(0), temperature, chunk)
    return loss, metrics["kl"]


def assert_close(ours, theirs):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(mine - other) <= 1e-5 * np.linalg.norm(other) + 1e-5


@settings(deadline=None, max_examples=6, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    rows=st.integers(1, 5),
    width=st.integers(2, 6),
    teacher_width=st.integers(2, 6),
    temperature=st.floats(0.5, 4),
    chunk=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_similarity_is_the_plain_formula_and_its_gradient_is_the_student_s(
    rows, width, teacher_width, temperature, chunk, seed
):
    outputs = pair(seed, 4 * rows, width, teacher_width)
    missing = np.random.default_rng(seed).random(4 * rows) < 0.3
    missing[0] = False

    def plain(outputs):
        return plain_similarity(of_rows(outputs, np.flatnonzero(~missing)), temperature)

    expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(outputs)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        laid = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)) if x.ndim else x, outputs)
        ours = jax.jit(jax.value_and_grad(lambda x: similarity(x, temperature, chunk, ~missing), has_aux=True))(laid)
    assert_close(ours, expected)
    assert not any(np.any(x) for x in jax.tree.leaves(ours[1]["teacher"]))


def test_a_student_that_agrees_has_no_divergence_and_no_gradient(mesh):
    outputs = model(np.random.default_rng(0), 6, 4, 20)
    run = jax.jit(jax.value_and_grad(lambda x, teacher: similarity(x | {"teacher": teacher}, 2.0), has_aux=True))
    (loss, divergence), gradient = run(outputs, outputs)
    assert loss > 0.1  # the teacher's entropy
    assert abs(divergence) < 1e-5
    assert all(np.abs(x).max() < 1e-5 for x in jax.tree.leaves(gradient))


def test_without_any_text_similarity_is_zero(mesh):
    run = jax.jit(jax.value_and_grad(lambda x: similarity(x, has_text=[False] * 3), has_aux=True))
    values, gradient = run(pair(0, 3, 4, 4))
    assert not any(np.any(x) for x in jax.tree.leaves((values, gradient)))


def features(outputs, modalities, **batch):
    return distillation.features(outputs, batch, jax.random.key(0), modalities)


def cosines(outputs, modality):
    student, teacher = (np.float64(each[modality]["embedding"]) for each in (outputs, outputs["teacher"]))
    return (student * teacher).sum(axis=1)


@settings(deadline=None, max_examples=8)
@given(rows=st.integers(1, 6), width=st.integers(2, 6), seed=st.integers(0, 1000))
def test_features_are_the_mean_over_the_embeddings_that_are_there(rows, width, seed):
    outputs = pair(seed, rows, width, width)
    has_text = np.random.default_rng(seed).random(rows) < 0.5
    loss, metrics = features(outputs, ("image",), has_text=jnp.asarray(has_text))
    assert loss == pytest.approx(1 - cosines(outputs, "image").mean(), abs=1e-5)
    assert "count" not in metrics
    loss, metrics = features(outputs, ("image", "text"), has_text=jnp.asarray(has_text))
    there = np.concatenate([cosines(outputs, "image"), cosines(outputs, "text")[has_text]])
    assert loss == pytest.approx(1 - there.mean(), abs=1e-5)
    assert metrics["count"] == len(there)


def test_features_move_the_student_alone():
    gradient = jax.grad(lambda x: features(x, ("image", "text"), has_text=jnp.array([True, False]))[0])(
        pair(0, 2, 4, 4)
    )
    assert not any(np.any(x) for x in jax.tree.leaves(gradient["teacher"]))
    assert np.all(np.any(gradient["image"]["embedding"], axis=1))
    assert np.array_equal(np.any(gradient["text"]["embedding"], axis=1), [True, False])


def test_features_of_texts_that_are_all_missing_are_zero():
    loss, metrics = features(pair(0, 3, 4, 4), ("text",), has_text=jnp.zeros(3, bool))
    assert (loss, metrics["count"]) == (0, 0)


def test_features_of_two_widths_are_refused():
    with pytest.raises(UserError, match="image embeddings: the student's are 4 wide and the teacher's 6"):
        features(pair(0, 2, 4, 6), ("image",))
