"""Distributed against a single device."""

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.data import pipeline
from mmjax.evaluators import Evaluation
from mmjax.sharding import distributed
from mmjax.sharding.rules import batch_sharding
from mmjax.training import setup
from tests import tiny

pytestmark = pytest.mark.sharding
STEPS = 10


def train(tmp_path, monkeypatch, shape, **changes):
    """Ten steps on a mesh of this shape; returns (losses, state, function that evaluates it)."""
    devices = jax.devices()[: int(np.prod(shape))]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda *_: len(devices))
    config = tiny.get_config(str(STEPS))
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    config.update_from_flattened_dict(changes)
    run = setup.prepare(config, tmp_path / "x".join(map(str, shape)))
    losses, sharding = [], batch_sharding(run.mesh)
    with jax.set_mesh(run.mesh):
        state = run.make_state()
        for name, batch, _ in pipeline.train_batches(config, run.sources, run.tokenizer, run.rows, 0, STEPS):
            batch = distributed.to_devices(batch, run.rows[name], sharding, 16)
            state, metrics = run.train_step(state, batch, ("contrastive",))
            losses.append(float(metrics["train/loss"]))

    def evaluate():
        model = api.Model(config, state.params, run.tokenizer, run.mesh)
        return Evaluation(config.evaluators).run(["test"], model, tmp_path)

    return np.array(losses), state, evaluate


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, shapes",
    [
        ("sigmoid", [(2, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]),
        ("softmax", [(8, 1, 1), (2, 2, 2)]),
    ],
)
def test_losses_and_recalls_are_those_of_one_device(tmp_path, monkeypatch, kind, shapes):
    kinds = {"objectives.contrastive.kind": kind}
    with monkeypatch.context() as patch:
        losses, _, evaluate = train(tmp_path, patch, (1, 1, 1), **kinds)
    assert losses[-1] < losses[0]
    recalls = evaluate()
    for shape in shapes:
        with monkeypatch.context() as patch:
            other, state, evaluate = train(tmp_path, patch, shape, **kinds)
        np.testing.assert_allclose(other, losses, rtol=1e-5, err_msg=str(shape))
        kernel = state.params["image"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
        moment = state.opt_state[1].mu["image"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
        for array in (kernel, moment):  # the parameter and its statistics are really split
            assert array.sharding.shard_shape(array.shape) == (2, 32 // shape[1], 64 // shape[2])
    for name, value in evaluate().items():  # on the last mesh
        assert value == pytest.approx(recalls[name], rel=0.02, abs=0.005), name


@pytest.mark.slow
def test_microbatches_on_a_mesh_are_those_of_one_device(tmp_path, monkeypatch):
    split = {"train.microbatches": 2}
    with monkeypatch.context() as patch:
        losses, _, _ = train(tmp_path, patch, (1, 1, 1), **split)
    with monkeypatch.context() as patch:
        other, _, _ = train(tmp_path, patch, (2, 2, 2), **split)
    np.testing.assert_allclose(other, losses, rtol=1e-5)
