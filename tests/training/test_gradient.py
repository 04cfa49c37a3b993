"""The gradient in microbatches against the gradient of the whole batch."""

from functools import partial

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmjax import api, objectives
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import batch_sharding, parameter_shardings
from mmjax.training.gradient import make_gradient
from tests import tiny

pytestmark = pytest.mark.sharding
ROWS = 16


def token_size(outputs, batch, rng):
    """An objective that looks at rows alone: a mean over the tokens of texts of different lengths."""
    valid = batch["text"] > 0
    noise = jax.vmap(partial(jax.random.uniform, shape=valid.shape[1:]))(batch["rng"])
    size = (outputs["text"]["tokens"][..., 0] * noise * valid).sum() / valid.sum()
    return size, {"mean_noise": (noise * valid).sum() / valid.sum(), "count": valid.sum()}


@pytest.fixture
def two_objectives(monkeypatch):
    """A config with a contrastive objective, one that looks at rows alone, and dropped tokens."""
    both = ("image", "text")
    monkeypatch.setitem(objectives.OBJECTIVES, "token_size", objectives.Objective(token_size, both, both))
    config = tiny.get_config()
    config.model.encoders.image.token_drop = 0.5
    config.model.encoders.image.depth = config.model.encoders.text.depth = 1
    config.objectives.size = ConfigDict({"kind": "token_size", "weight": 0.5})
    return config


def batch(rows=ROWS):
    rng = np.random.default_rng(0)
    text = rng.integers(1, 4000, (rows, 8), np.int32)
    text[np.arange(8) >= rng.integers(2, 9, (rows, 1))] = 0
    image = rng.integers(0, 256, (rows, 28, 28, 3), np.uint8)
    return {"image": image, "text": text, "rng": jax.random.split(jax.random.key(7), rows)}


def gradient(config, shape, microbatches, kind="sigmoid", names=("contrastive", "size")):
    """(gradient, metrics) on the host."""
    config = config.copy_and_resolve_references()
    config.train.microbatches, config.objectives.contrastive.kind = microbatches, kind
    module, one = api.make_module(config), make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(one):
        params = jax.device_get(jax.jit(partial(api.init_params, config, module))())
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parameter_shardings(params, mesh))
        rows = jax.device_put(batch(), batch_sharding(mesh))
        function = jax.jit(make_gradient(config, module), static_argnums=3)
        return jax.device_get(function(params, rows, jax.random.key(1), names))


def assert_equal(found, expected):
    (grads, metrics), (expected_grads, expected_metrics) = found, expected
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    total = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(expected_grads)))
    assert total > 0.1
    difference = jax.tree.map(lambda a, b: np.linalg.norm(a - b), grads, expected_grads)
    assert max(jax.tree.leaves(difference)) < 1e-5 * total, difference


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, parts",
    [("sigmoid", {(8, 1, 1): (2,), (1, 1, 1): (4, 16)}), ("softmax", {(2, 2, 2): (4,), (1, 1, 1): (2,)})],
)
def test_microbatches_have_the_gradient_and_the_metrics_of_the_whole_batch(two_objectives, kind, parts):
    expected = gradient(two_objectives, (1, 1, 1), 1, kind)
    for shape, counts in parts.items():
        for count in counts:
            assert_equal(gradient(two_objectives, shape, count, kind), expected)


@pytest.mark.parametrize("name", ["contrastive", "size"])
def test_each_kind_of_objective_may_be_alone(two_objectives, name):
    expected = gradient(two_objectives, (1, 1, 1), 1, names=(name,))
    assert f"train/{name}_count" not in expected[1]
    assert_equal(gradient(two_objectives, (1, 1, 1), 4, names=(name,)), expected)


def test_microbatches_need_less_memory():
    config, rows = tiny.get_config(), 256
    config.model.encoders.image.depth = config.model.encoders.text.depth = 1

    def temporaries(microbatches):
        config.train.microbatches = microbatches
        module = api.make_module(config)
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            params = jax.eval_shape(partial(api.init_params, config, module))
            function = jax.jit(make_gradient(config, module), static_argnums=3)
            compiled = function.lower(params, batch(rows), jax.random.key(0), ("contrastive",)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 3
