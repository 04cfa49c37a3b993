import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives import OBJECTIVES
from mmjax.training import health, setup
from tests import tiny


def judged(values, zscore=0.0):
    """Feeds (loss, gradient norm) pairs to the guard; returns which were good, and what it remembers."""
    state, good = health.new(), []
    step = jax.jit(health.judge, static_argnums=3)
    for loss, norm in values:
        ok, state = step(state, jnp.float32(loss), jnp.float32(norm), zscore)
        good.append(bool(ok))
    return good, state


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_skipped_and_counted(value, place):
    bad = [1.0, 1.0]
    bad[place] = value
    good, state = judged([(1, 1), bad, bad, (2, 3), bad])
    assert good == [True, False, False, True, False]
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.accepted)) == (3, 1, 2)
    np.testing.assert_allclose(state.mean, [1.5, 2.0])


def test_mean_and_variance_are_those_of_the_values_seen():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, (80, 2))
    _, state = judged(values)
    np.testing.assert_allclose(state.mean, values.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(state.variance, values.var(axis=0), rtol=1e-4)


def test_a_spike_is_skipped_once_there_is_something_to_compare_with():
    rng = np.random.default_rng(0)
    usual = [tuple(pair) for pair in rng.normal(5, 0.5, (health.FIRST_JUDGED, 2))]
    good, state = judged([*usual, (5, 50), (50, 5), (5, 5), (1, 1)], zscore=6.0)
    assert good == [True] * len(usual) + [False, False, True, True]  # a fall is no spike
    assert float(state.mean[1]) < 6
    early, _ = judged([*usual[:-1], (5, 50)], zscore=6.0)
    assert all(early)
    unguarded, _ = judged([*usual, (5, 50)])
    assert all(unguarded)


def test_a_skipped_step_leaves_parameters_optimizer_and_average_untouched(tmp_path, monkeypatch, openmoji_folder):
    sigmoid = OBJECTIVES["sigmoid"].run

    def explodes_on_token_7(outputs, batch, *rest, **options):
        loss, metrics = sigmoid(outputs, batch, *rest, **options)
        return jnp.where((batch["text"] == 7).any(), jnp.nan, loss), metrics

    monkeypatch.setitem(OBJECTIVES, "sigmoid", OBJECTIVES["sigmoid"]._replace(run=explodes_on_token_7))
    config = tiny.get_config()
    config.train.ema_decay = 0.9
    run = setup.prepare(config, tmp_path)
    rng = np.random.default_rng(0)
    good = {
        "image": jnp.asarray(rng.integers(0, 256, (16, 28, 28, 3), np.uint8)),
        "text": jnp.asarray(rng.integers(8, 4000, (16, 8), np.int32)),
    }
    bad = {**good, "text": good["text"].at[3, 2].set(7)}
    with jax.set_mesh(run.mesh):
        before, _ = run.train_step(run.make_state(), good, ("contrastive",))
        kept = jax.tree.map(np.asarray, before)
        after, metrics = run.train_step(before, bad, ("contrastive",))
        for name in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(kept, name))
        assert int(after.step) == 2 and int(metrics["train/skipped_steps"]) == 1
        assert not np.isfinite(float(metrics["train/loss"]))
        moved, metrics = run.train_step(after, good, ("contrastive",))
    assert int(metrics["train/skipped_in_a_row"]) == 0 and int(metrics["train/skipped_steps"]) == 1
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), moved.params, kept.params)
    assert any(jax.tree.leaves(changed))
