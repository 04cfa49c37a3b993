"""A text tower that reads the image with layers of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mmjax import api, explain
from mmjax import config as configs
from mmjax.data import sources, text
from mmjax.models import flops
from mmjax.models.multimodal import Text
from mmjax.models.outputs import Outputs
from mmjax.objectives import matching
from mmjax.sharding.mesh import make_mesh
from tests import tiny

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
TEXTS = ["a red apple", "dog", "flag of the moon"]


@pytest.fixture(scope="module", params=["pre", "post"])
def model(request):
    config, mesh = tiny.get_config(), make_mesh(devices=jax.devices()[:1])
    config.model.encoders.text.update({"norm": request.param, "pooling": "cls"})
    config.model.fusion = configs.fusion(depth=0, reads="tower", pooling="cls")
    config.objectives.matching = configs.objective(kind="matching")
    config.objectives.masked = configs.objective(kind="masked")
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: api.init_params(config, api.make_module(config)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return api.Model(config, params, text.load(sources.tokenizer_path("openmoji:en", ())), mesh)


def applied(model, method, *arguments, params=None):
    with jax.set_mesh(model.mesh):
        return model.module.apply({"params": params or model.params}, *arguments, method=method)


def test_no_layer_is_held_twice(model):
    assert set(model.params["fusion"]) == {"match_head", "token_head"}
    blocks = model.params["text"]["transformer"]["blocks"]
    assert set(blocks) == {"attention", "cross_attention", "mlp", "norm1", "norm_cross", "norm2"}
    assert blocks["cross_attention"]["key"]["kernel"].shape == (2, 32, 32)


def test_a_text_by_itself_sees_no_image(model):
    ids = jnp.asarray(model.token_ids(TEXTS))
    flat = flatten_dict(model.params, sep="/")
    without = unflatten_dict({path: leaf * ("cross" not in path) for path, leaf in flat.items()}, sep="/")
    tokens, valid = applied(model, "tokens", "text", ids)
    alone = applied(model, "predict", Text(ids, None, None), None)
    np.testing.assert_array_equal(alone, applied(model, "predict", Text(ids, None, None), None, params=without))
    head = applied(model, "predict", Text(ids, tokens, valid), None, jnp.zeros((3, 1), jnp.int32))
    np.testing.assert_allclose(alone[:, :1], head, atol=1e-5)
    with_image = applied(model, "predict", Text(ids, tokens, valid), applied(model, "tokens", "image", IMAGES)[0])
    assert jnp.abs(with_image - alone).max() > 0.1


def test_matching_trains_the_layers_that_see_the_image(model):
    ids = model.token_ids(TEXTS)

    def loss(params):
        batch = {"image": jnp.asarray(IMAGES), "text": jnp.asarray(ids), "rng": jax.random.split(jax.random.key(0), 3)}
        return matching.matching(Outputs(model.module, params, batch), batch, None)[0]

    with jax.set_mesh(model.mesh):
        slopes = jax.jit(jax.grad(loss))(model.params)["text"]["transformer"]["blocks"]
    for name in ("attention", "cross_attention"):
        assert (jnp.abs(slopes[name]["value"]["kernel"]).max(axis=(1, 2)) > 0).all()


def test_what_its_tokens_attend_to_can_be_shown(model):
    for tokens in explain.cross_attention(model, IMAGES, TEXTS):
        for _, heat in tokens:
            assert heat.shape == (2, 2) and heat.sum() == pytest.approx(1, abs=1e-5)


def test_its_work_is_counted_for_all_layers_of_the_tower(model):
    settings = model.config.model.to_dict()
    of_its_own = settings | {"fusion": {**settings["fusion"], "reads": "text", "depth": 2}}
    assert flops.part_flops(settings, "fusion") == flops.part_flops(of_its_own, "fusion") > 0
