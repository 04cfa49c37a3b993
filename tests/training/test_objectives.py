"""Several objectives in one step: against each alone, against plain formulas, in microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import api
from mmjax.models.multimodal import ImageEncoder, TextEncoder
from mmjax.models.outputs import Outputs
from mmjax.objectives import OBJECTIVES
from mmjax.sharding.mesh import make_mesh
from tests.training import everything

pytestmark = pytest.mark.sharding
NAMES = ("contrastive", "captioning", "masked", "matching", "distilled")


def run(config, names, batch, microbatches=1):
    """(gradient, metrics) on the host."""
    config = config.copy_and_resolve_references()
    config.train.microbatches = microbatches
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        params = everything.parameters(config), everything.parameters(config, seed=1)
        return jax.device_get(jax.jit(everything.gradient_function(config, names))(*params, batch))


@pytest.fixture(scope="module")
def together():
    """All objectives in one step: config, batch, result."""
    config, batch = everything.config_of(), everything.batch()
    return config, batch, run(config, NAMES, batch)


@pytest.mark.slow
def test_gradient_and_loss_are_the_weighted_sums_of_those_of_each_objective_alone(together):
    """So what is drawn for one does not depend on the others."""
    config, batch, (grads, metrics) = together
    total, loss = None, 0.0
    for name in NAMES:
        own_grads, own = run(config, (name,), batch)
        assert everything.norm(own_grads) > 0.01
        assert own["train/loss"] == pytest.approx(config.objectives[name].weight * own[f"train/{name}_loss"], rel=1e-5)
        assert metrics[f"train/{name}_loss"] == pytest.approx(own[f"train/{name}_loss"], rel=1e-5)
        assert not any(key.endswith("grad_norm") for key in own)
        loss += own["train/loss"]
        total = own_grads if total is None else jax.tree.map(np.add, total, own_grads)
    everything.assert_equal((grads, {}), (total, {}))
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_the_norms_are_those_of_the_gradient_with_respect_to_the_tokens(together):
    config, batch, (_, metrics) = together
    batch = jax.tree.map(jnp.asarray, batch)
    module, words = api.make_module(config), everything.vocabulary()
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        both = everything.parameters(config), everything.parameters(config, seed=1)

        def loss_of(name, params, tokens, valid, teacher):
            known = {
                modality: {
                    "tokens": x,
                    "valid": valid[modality],
                    **module.apply({"params": params}, modality, x, valid[modality], method="embed"),
                }
                for modality, x in tokens.items()
            }
            outputs = Outputs(module, params, batch, known | {"teacher": teacher}, words)
            number = 1000 + sorted(config.objectives).index(name)
            keys = jax.vmap(jax.random.fold_in, (0, None))(batch["rng"], number)
            options = {key: value for key, value in config.objectives[name].items() if key not in ("kind", "weight")}
            run = OBJECTIVES[config.objectives[name].kind].run
            loss, _ = run(outputs, {**batch, "rng": keys}, jax.random.fold_in(jax.random.key(1), number), **options)
            return config.objectives[name].weight * loss

        def norms(params, teacher_params):
            out = {
                modality: module.apply({"params": params}, modality, batch[modality], batch["rng"], method="tokens")
                for modality in ("image", "text")
            }
            tokens, valid = ({modality: pair[place] for modality, pair in out.items()} for place in (0, 1))
            seen = {"image": batch["image"], "text": batch["text"]}
            teacher = Outputs(module, teacher_params, seen, vocabulary=words)
            found = {name: jax.grad(loss_of, argnums=2)(name, params, tokens, valid, teacher) for name in NAMES}
            return jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, found))

        found = jax.device_get(jax.jit(norms)(*both))
    reported = {key: value for key, value in metrics.items() if key.endswith("grad_norm")}
    expected = {
        f"train/{name}_{modality}_grad_norm": value for name, own in found.items() for modality, value in own.items()
    }
    assert reported == {name: pytest.approx(value, rel=1e-4, abs=1e-7) for name, value in expected.items()}
    assert all(expected[f"train/{name}_image_grad_norm"] > 1e-3 for name in NAMES)


def test_a_tower_runs_once_however_many_objectives_read_it(monkeypatch):
    """Only masked modelling runs the text tower itself: it reads another text."""
    calls = []
    for encoder in (ImageEncoder, TextEncoder):

        def counting(self, *arguments, original=encoder.__call__, name=encoder.__name__):
            calls.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(encoder, "__call__", counting)

    def trace(names):
        config = everything.config_of()
        config.objectives.masked.teacher_weight = 0.0
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            params = everything.parameters(config)
            calls.clear()
            jax.make_jaxpr(everything.gradient_function(config, names))(params, params, everything.batch())
        return sorted(calls)

    assert trace(("masked",)) == trace(("contrastive",)) == ["ImageEncoder", "TextEncoder"]
    assert trace(("contrastive", "captioning", "matching")) == ["ImageEncoder", "TextEncoder"]
    assert trace(("contrastive", "captioning", "matching", "masked")) == ["ImageEncoder", "TextEncoder", "TextEncoder"]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [{}, {"reads": "text", "image": "prefix", "image_queries": 2}])
def test_microbatches_have_the_gradient_and_the_metrics_of_the_whole_batch(decoder):
    """Of objectives whose rows do not meet, or meet in their embeddings alone; tokens are dropped, texts missing."""
    config, names = everything.config_of(**decoder), ("contrastive", "captioning", "masked", "distilled")
    batch = everything.batch()
    expected = run(config, names, batch)
    assert expected[1]["train/masked_loss"] > 0.1 and expected[1]["train/captioning_loss"] > 0.1
    everything.assert_equal(run(config, names, batch, microbatches=4), expected)


@pytest.mark.slow
def test_matching_in_microbatches_is_the_mean_over_them():
    config = everything.config_of()
    batch = everything.batch(missing=0)
    grads, metrics = run(config, ("matching",), batch, microbatches=2)
    parts = [run(config, ("matching",), jax.tree.map(lambda x, first=first: x[first::2], batch)) for first in (0, 1)]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *parts)
    everything.assert_equal((grads, metrics), mean)
    assert abs(parts[0][1]["train/matching_loss"] - parts[1][1]["train/matching_loss"]) > 1e-3
