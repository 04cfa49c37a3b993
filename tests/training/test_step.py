import jax
import jax.numpy as jnp
import numpy as np

from mmjax.training import setup
from tests import tiny


def run_one(tmp_path, batch_seed=0, **changes):
    config = tiny.get_config()
    config.train.update(changes)
    run = setup.prepare(config, tmp_path)
    rng = np.random.default_rng(batch_seed)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (16, 28, 28, 3), np.uint8)),
        "text": jnp.asarray(rng.integers(1, 4000, (16, 8), np.int32)),
    }
    return run, batch


def test_the_moving_average_follows_the_parameters(tmp_path, openmoji_folder):
    run, batch = run_one(tmp_path, ema_decay=0.99)
    with jax.set_mesh(run.mesh):
        state = run.make_state()
        expected = jax.tree.map(np.asarray, state.params)
        for step in range(3):
            state, _ = run.train_step(state, batch, ("contrastive",))
            decay = min(0.99, (1 + step) / (10 + step))
            expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)
    assert int(state.step) == 3


def test_microbatches_average_the_gradients_of_their_rows(tmp_path, openmoji_folder):
    """Microbatch m holds rows m, m + 2, ...: its loss is that of these rows alone."""
    whole, batch = run_one(tmp_path / "whole")
    split, _ = run_one(tmp_path / "split", microbatches=2)
    with jax.set_mesh(whole.mesh):
        parts = [
            whole.train_step(whole.make_state(), {k: v[m::2] for k, v in batch.items()}, ("contrastive",))[1]
            for m in range(2)
        ]
        _, metrics = split.train_step(split.make_state(), batch, ("contrastive",))
    expected = np.mean([float(part["train/loss"]) for part in parts])
    np.testing.assert_allclose(metrics["train/loss"], expected, rtol=1e-5)


def test_an_objectives_weight_scales_its_loss(tmp_path, openmoji_folder):
    run, batch = run_one(tmp_path / "one")
    config = run.config.copy_and_resolve_references()
    config.objectives.contrastive.weight = 3.0
    other = setup.prepare(config, tmp_path / "three")
    with jax.set_mesh(run.mesh):
        _, one = run.train_step(run.make_state(), batch, ("contrastive",))
        _, three = other.train_step(other.make_state(), batch, ("contrastive",))
    np.testing.assert_allclose(three["train/loss"], 3 * one["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(three["train/contrastive_loss"], one["train/contrastive_loss"], rtol=1e-5)
