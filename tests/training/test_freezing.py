"""Parameters that a rule freezes: no gradient, no update, nothing kept for them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.sharding.mesh import make_mesh
from mmjax.training import setup
from mmjax.training.gradient import make_gradient
from tests import tiny
from tests.training import everything

FROZEN_IMAGE = (("^image/", None, 0.0),)


def batch(rows):
    found = everything.batch(rows, missing=0)
    return {name: jnp.asarray(found[name]) for name in ("image", "text")}


def test_a_frozen_tower_has_no_gradient_and_stays_as_it_is(tmp_path, openmoji_folder):
    config = tiny.get_config()
    config.model.encoders.image.depth = config.model.encoders.text.depth = 1
    config.model.decoder = configs.decoder(depth=1)
    config.objectives.captioning = configs.objective(kind="captioning")
    config.optimizer.rules = FROZEN_IMAGE
    config.optimizer.weight_decay, config.optimizer.warmup = 0.1, 0.0
    run = setup.prepare(config, tmp_path)
    with jax.set_mesh(run.mesh):
        state = run.make_state()
        before = jax.device_get(state.params)
        gradient = jax.jit(make_gradient(config, api.make_module(config)), static_argnums=3)
        keyed = batch(16) | {"rng": jax.random.split(jax.random.key(0), 16)}
        grads, _ = gradient(state.params, keyed, jax.random.key(0), ("contrastive", "captioning"))
        for _ in range(2):
            state, metrics = run.train_step(state, batch(16), ("contrastive", "captioning"))
    assert (
        everything.norm(grads["image"])
        == 0
        < min(everything.norm(grads[name]) for name in ("image_projection", "text", "decoder", "logit_scale"))
    )
    assert float(metrics["train/captioning_image_grad_norm"]) > 0  # as far as the tokens it is computed
    changed = jax.tree.map(lambda old, new: bool((old != np.asarray(new)).any()), before, state.params)
    assert not any(jax.tree.leaves(changed["image"]))
    assert all(any(jax.tree.leaves(changed[name])) for name in ("image_projection", "text", "decoder"))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    trained = sum(leaf.size for name, part in before.items() if name != "image" for leaf in jax.tree.leaves(part))
    assert kept == pytest.approx(2 * trained, rel=0.01)  # Adam's two moments


def test_the_first_rule_that_matches_decides():
    config = everything.config_of()
    config.optimizer.rules = (
        ("image/.*/mlp/", 0.1, 1.0),
        ("^image/", None, 0.0),
        ("^text/", 1.0, 1.0),
        ("/", None, 0.0),
    )
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        params, names = everything.parameters(config), ("contrastive",)
        run = jax.jit(everything.gradient_function(config, names))
        grads, _ = run(params, params, everything.batch())
    moving = {
        "/".join(key.key for key in path) for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if leaf.any()
    }
    assert {name.split("/")[0] for name in moving} == {"image", "text", "logit_scale", "logit_bias"}
    assert all("/mlp/" in name for name in moving if name.startswith("image/"))
    assert any("token_embed" in name for name in moving)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_nothing_is_kept_for_the_backward_pass_of_a_frozen_tower(microbatches):
    config = tiny.get_config()
    config.model.encoders.image.depth, config.model.encoders.text.depth = 12, 1
    config.train.microbatches = microbatches

    def temporaries(rules):
        config.optimizer.rules = rules
        module, rows = api.make_module(config), everything.batch(256, missing=0)
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            params = jax.eval_shape(partial(api.init_params, config, module))
            function = jax.jit(make_gradient(config, module), static_argnums=3)
            compiled = function.lower(params, rows, jax.random.key(0), ("contrastive",)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(FROZEN_IMAGE) < 0.6 * temporaries(())
