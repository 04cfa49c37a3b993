import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.training.optimizer import in_steps, learning_rate_schedule, make_optimizer
from mmjax.validation import SCHEDULES

PARAMS = {
    "image": {"mlp": {"up": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}}},
    "text": {"head": {"kernel": jnp.ones((4, 4))}},
    "logit_scale": jnp.ones(()),
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def settings(**changes):
    optimizer = configs.default().optimizer
    optimizer.update(changes)
    return optimizer


def one_update(grads, **changes):
    optimizer = make_optimizer(settings(**changes), PARAMS)
    state = optimizer.init(PARAMS)
    updates, state = jax.jit(optimizer.update)(grads, state, PARAMS)
    return updates, state


def test_durations_in_steps_examples_and_epochs():
    assert in_steps(80, "steps", 256, 3544) == 80
    assert in_steps(2560, "examples", 256, 3544) == 10
    assert in_steps(2, "epochs", 256, 3584) == 28


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_and_decay(name):
    schedule = learning_rate_schedule(settings(schedule=name, learning_rate=1.0), 110, 10)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0, 0.5, 1], atol=1e-6)
    half, end = float(schedule(60)), float(schedule(110))
    expected = {
        "cosine": (0.5, 0),
        "linear": (0.5, 0),
        "constant": (1, 1),
        "rsqrt": ((10 / 60) ** 0.5, (10 / 110) ** 0.5),
    }
    np.testing.assert_allclose([half, end], expected[name], atol=1e-6)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match="config.optimizer.warmup"):
        learning_rate_schedule(settings(), 10, 10)


def test_weight_decay_falls_on_matrices_only():
    """Stacked biases have two dimensions too, and are spared."""
    updates, _ = one_update(ZEROS, weight_decay=0.5)
    np.testing.assert_allclose(updates["image"]["mlp"]["up"]["kernel"], 0.5, rtol=1e-5)
    np.testing.assert_array_equal(updates["image"]["mlp"]["up"]["bias"], 0)
    assert updates["logit_scale"] == 0


def test_rules_scale_and_freeze():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    plain, _ = one_update(grads, weight_decay=0.0)
    rules = (("^image/", None, 1.0), ("logit", 0.1, 0.0))
    updates, state = one_update(grads, weight_decay=0.0, rules=rules)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates["image"]))
    np.testing.assert_allclose(updates["logit_scale"], 0.1 * plain["logit_scale"], rtol=1e-5)
    np.testing.assert_allclose(updates["text"]["head"]["kernel"], plain["text"]["head"]["kernel"], rtol=1e-5)
    assert (2, 4, 4) not in [leaf.shape for leaf in jax.tree.leaves(state)], "a frozen parameter has no state"


def test_a_frozen_parameter_does_not_count_in_the_clipping():
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    grads["text"]["head"]["kernel"] = jnp.full((4, 4), 0.1)  # norm 0.4: not clipped
    grads["image"]["mlp"]["up"]["kernel"] = jnp.full((2, 4, 4), 1e6)
    rules = (("^image/", None, 1.0),)
    _, state = one_update(grads, rules=rules)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 4)]
    np.testing.assert_allclose(max(moments, key=lambda leaf: leaf.max()), 0.01, rtol=1e-4)


def test_rules_that_match_nothing_or_freeze_everything_are_refused():
    for rules, message in (((("imgae", 1.0, 1.0),), "matches no parameter"), ((("", None, 1.0),), "freeze every")):
        with pytest.raises(UserError, match=message):
            make_optimizer(settings(rules=rules), PARAMS)


def test_gradients_are_clipped_by_their_global_norm():
    grads = jax.tree.map(lambda leaf: 100 * jnp.ones_like(leaf), PARAMS)
    _, state = one_update(grads, grad_clip_norm=1.0, b1=0.0)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(state[1].mu)))
    assert norm == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_every_optimizer_learns_and_holds_its_first_moment_in_bfloat16(name):
    target = jax.tree.map(lambda leaf: leaf + 1.0, PARAMS)

    def loss(params):
        return sum(((a - b) ** 2).sum() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))

    optimizer = make_optimizer(settings(name=name, weight_decay=0.0, first_moment_dtype="bfloat16"), PARAMS)
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s, p))
    for _ in range(40):
        updates, state = update(params, state)
        params = jax.tree.map(lambda old, change: old - 0.05 * change, params, updates)
    assert loss(params) < 0.5 * loss(PARAMS)
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state))
