"""Distributed against a single device."""

from functools import partial

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.data import pipeline
from mmjax.evaluators import Evaluation
from mmjax.sharding import distributed
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import batch_sharding, parameter_shardings
from mmjax.training import setup
from tests import tiny
from tests.training import everything

pytestmark = pytest.mark.sharding
IMAGE, TEXT = "model.encoders.image", "model.encoders.text"
# Between them, each objective, microbatches and dropped tokens meet every mesh.
MESHES = {
    "sigmoid": [(8, 1, 1), (2, 2, 2)],
    "sigmoid in microbatches": [(1, 8, 1), (1, 1, 8)],
    "softmax on kept tokens": [(1, 8, 1), (1, 1, 8)],
    "softmax on kept tokens in microbatches": [(8, 1, 1), (2, 2, 2)],
}
VARIANTS = {
    "sigmoid": {f"{IMAGE}.pooling": "map"},
    "sigmoid in microbatches": {f"{IMAGE}.pooling": "mean", f"{TEXT}.pooling": "map", "train.microbatches": 2},
    "softmax on kept tokens": {f"{IMAGE}.pooling": "last", f"{IMAGE}.token_drop": 0.5, f"{TEXT}.causal": True},
    "softmax on kept tokens in microbatches": {
        f"{IMAGE}.pooling": "cls",
        f"{IMAGE}.token_drop": 0.5,
        "objectives.contrastive.chunk": 1,
        "train.microbatches": 2,
    },
}


def train(tmp_path, monkeypatch, shape, steps, **changes):
    """Some steps on a mesh of this shape; returns (losses, state, function that evaluates it).

    The texts are captions of different lengths, their padding masked.
    """
    devices = jax.devices()[: int(np.prod(shape))]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda *_: len(devices))
    config = tiny.get_config(str(steps))
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    config.update_from_flattened_dict(changes)
    run = setup.prepare(config, tmp_path / "x".join(map(str, shape)))
    losses, sharding = [], batch_sharding(run.mesh)
    with jax.set_mesh(run.mesh):
        state = run.make_state()
        for name, batch, _ in pipeline.train_batches(config, run.sources, run.tokenizer, run.rows, 0, steps):
            batch = distributed.to_devices(batch, run.rows[name], sharding, 16)
            state, metrics = run.train_step(state, batch, ("contrastive",))
            losses.append(float(metrics["train/loss"]))

    def evaluate():
        model = api.Model(config, state.params, run.tokenizer, run.mesh)
        return Evaluation(config.evaluators).run(["test"], model, tmp_path)

    return np.array(losses), state, evaluate


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_parameters_are_those_of_one_device(tmp_path, monkeypatch, variant):
    changes = {"objectives.contrastive.kind": variant.split()[0], "optimizer.warmup": 1.0} | VARIANTS[variant]
    # Adam divides by the size of a gradient: with a small epsilon, rounding errors become whole updates where a
    # gradient is 0, as those of the keys' biases are.
    changes |= {"optimizer.epsilon": 0.01, "optimizer.learning_rate": 0.01}
    with monkeypatch.context() as patch:
        losses, state, _ = train(tmp_path, patch, (1, 1, 1), 3, **changes)
    expected = jax.device_get(state.params)
    assert losses[-1] < losses[0]
    for shape in MESHES[variant]:
        with monkeypatch.context() as patch:
            other, state, _ = train(tmp_path, patch, shape, 3, **changes)
        np.testing.assert_allclose(other, losses, rtol=1e-5, err_msg=str(shape))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), jax.device_get(state.params), expected)
        kernel = state.params["image"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
        moment = state.opt_state[1].mu["image"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
        for array in (kernel, moment):  # the parameter and its statistics are really split
            assert array.sharding.shard_shape(array.shape) == (2, 32 // shape[1], 64 // shape[2])


def gradient_of_everything(shape):
    """(gradient, metrics) of all objectives in one step, on the host."""
    config = everything.config_of()
    for encoder in config.model.encoders.values():
        encoder.heads = 8
    names = ("contrastive", "captioning", "masked", "matching", "distilled")
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        params = [everything.parameters(config, seed) for seed in (0, 1)]
        params = jax.device_put(params, [parameter_shardings(each, mesh) for each in params])
        batch = jax.device_put(everything.batch(), batch_sharding(mesh))
        return jax.device_get(jax.jit(everything.gradient_function(config, names))(*params, batch))


@pytest.fixture(scope="module")
def everything_on_one_device():
    return gradient_of_everything((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_all_objectives_have_the_gradient_and_the_metrics_of_one_device(everything_on_one_device, shape):
    everything.assert_equal(gradient_of_everything(shape), everything_on_one_device)


@pytest.mark.slow
def test_recalls_on_a_mesh_of_every_axis_are_those_of_one_device(tmp_path, monkeypatch):
    """tests/evaluators/test_everywhere.py compares all evaluators on data-parallel devices."""
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with monkeypatch.context() as patch:
            losses, _, evaluate = train(tmp_path, patch, shape, 10)
        assert losses[-1] < losses[0]
        found.append(evaluate())
    for name, value in found[1].items():
        assert value == pytest.approx(found[0][name], rel=0.02, abs=0.005), name
