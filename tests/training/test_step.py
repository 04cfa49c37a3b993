import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import attention
from mmjax.sharding.rules import batch_sharding, path_name
from mmjax.training import setup
from tests import tiny


def run_one(tmp_path, token_drop=0.0, image=(), **changes):
    config = tiny.get_config()
    config.model.encoders.image.update({"token_drop": token_drop, **dict(image)})
    config.train.update(changes)
    run = setup.prepare(config, tmp_path)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (16, 28, 28, 3), np.uint8)),
        "text": jnp.asarray(rng.integers(1, 4000, (16, 8), np.int32)),
    }
    return run, batch


def test_the_model_is_traced_once_for_the_parameters_and_once_for_the_step(tmp_path, openmoji_folder, monkeypatch):
    traced, chosen = [], attention.implementation
    monkeypatch.setattr(attention, "implementation", lambda *given: traced.append(1) or chosen(*given))
    run, batch = run_one(tmp_path)
    with jax.set_mesh(run.mesh):
        run.make_state()
        assert len(traced) == 5  # in two towers, where the scan's check is one more, and in the image's pooling
        run.compile_step(batch, ("contrastive",))
    assert len(traced) == 8


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


@pytest.mark.sharding
def test_a_step_that_was_compiled_before_there_is_a_state_is_not_compiled_again(tmp_path, openmoji_folder):
    run, batch = run_one(tmp_path)
    compiled = []

    def note(event: str, seconds: float, **names) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(names)

    with jax.set_mesh(run.mesh):
        batch, state = jax.device_put(batch, batch_sharding(run.mesh)), run.make_state()
        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            run.compile_step(batch, ("contrastive",))
            assert len(compiled) == 1
            run.train_step(state, batch, ("contrastive",))
        finally:
            jax.monitoring.unregister_event_duration_listener(note)
    assert len(compiled) == 1


def test_microbatches_change_nothing_but_the_memory(tmp_path, openmoji_folder):
    """Dropped tokens too: they depend on the row's place in the whole batch."""
    whole, batch = run_one(tmp_path / "whole", token_drop=0.5)
    split, _ = run_one(tmp_path / "split", token_drop=0.5, microbatches=2)
    with jax.set_mesh(whole.mesh):
        _, expected = whole.train_step(whole.make_state(), batch, ("contrastive",))
        _, metrics = split.train_step(split.make_state(), batch, ("contrastive",))
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("relative", ["layer", "shared"])
def test_towers_with_relative_positions_gated_mlps_and_scaled_layers_are_trained(tmp_path, openmoji_folder, relative):
    """Like BEiT's and DINOv2's; every parameter but the token of hidden patches, of which there are none, moves."""
    settings = {"relative_position": relative, "position": "none", "gated": True, "activation": "silu"}
    settings |= {"layer_scale": 0.1, "key_bias": False, "class_token": True, "mask_token": True, "pooling": "mean"}
    run, batch = run_one(tmp_path, image=settings)
    with jax.set_mesh(run.mesh):
        state = run.make_state()
        before = jax.tree.map(np.array, state.params["image"])
        for _ in range(2):  # the first one's learning rate is 0
            state, metrics = run.train_step(state, batch, ("contrastive",))
    moved = jax.tree.map(lambda old, new: bool(np.any(old != np.asarray(new))), before, state.params["image"])
    still = [path_name(path) for path, value in jax.tree_util.tree_leaves_with_path(moved) if not value]
    assert still == ["mask_token"] and np.isfinite(metrics["train/loss"])
    block = state.params["image"]["transformer"]["blocks"]
    table = {"layer": block, "shared": state.params["image"]}[relative]["relative_position"]["bias_table"]
    assert table.shape == {"layer": (2, 12, 8), "shared": (12, 8)}[relative] and "gate" in block["mlp"]


def test_tokens_are_dropped_anew_in_every_step(tmp_path, openmoji_folder):
    run, batch = run_one(tmp_path, token_drop=0.5)
    with jax.set_mesh(run.mesh):
        losses = []
        for step in (0, 0, 1):
            state = run.make_state()
            _, metrics = run.train_step(state.replace(step=jnp.int32(step)), batch, ("contrastive",))
            losses.append(float(metrics["train/loss"]))
    assert losses[0] == losses[1] != losses[2]


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


def test_the_learning_rate_is_that_of_the_step_however_many_were_skipped(tmp_path, openmoji_folder):
    run, batch = run_one(tmp_path)
    with jax.set_mesh(run.mesh):
        changes = []
        for step in (2, 6):
            before = run.make_state()
            start = jax.tree.map(np.asarray, before.params)
            state, metrics = run.train_step(before.replace(step=jnp.int32(step)), batch, ("contrastive",))
            moved = jax.tree.map(lambda old, new: np.abs(new - old).max(), start, state.params)
            changes.append(max(jax.tree.leaves(moved)) / float(metrics["train/learning_rate"]))
    # Adam's first update is +-1 wherever there is a gradient.
    np.testing.assert_allclose(changes, 1, rtol=1e-2)
