"""Hidden tokens that are filled in with the image in sight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.data import text
from mmjax.errors import UserError
from mmjax.models.multimodal import Text
from mmjax.sharding.mesh import make_mesh
from tests import tiny
from tests.interop import bert_tokenizer

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
TEXTS = ["a [MASK] fox", "[MASK] dog [MASK]"]


@pytest.fixture
def model(tmp_path):
    bert_tokenizer.write(tmp_path)
    config, mesh = tiny.get_config(), make_mesh(devices=jax.devices()[:2])
    config.model.encoders.text.update({"length": 16, "vocab_size": 440})
    config.model.fusion = configs.fusion(depth=1)
    config.objectives.masked = configs.objective(kind="masked")
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: api.init_params(config, api.make_module(config)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return api.Model(config, params, text.load(tmp_path), mesh)


def test_the_image_is_seen_and_the_likeliest_come_first(model):
    ids = jnp.asarray(model.token_ids(TEXTS))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        image, _ = model.module.apply({"params": model.params}, "image", IMAGES, method="tokens")
        read = Text(ids, *model.module.apply({"params": model.params}, "text", ids, method="tokens"))
        probabilities = jax.nn.softmax(model.module.apply({"params": model.params}, read, image, method="predict"))
    found = model.fill_mask(TEXTS, IMAGES, top_k=3)
    for row, of_text in enumerate(found):
        places = np.flatnonzero(ids[row] == model.tokenizer.mask_id)
        assert len(of_text) == len(places) == row + 1
        for place, candidates in zip(places, of_text, strict=True):
            likeliest = np.argsort(-probabilities[row, place])[:3]
            assert [token for token, _ in candidates] == [model.tokenizer.decode([index]) for index in likeliest]
            np.testing.assert_allclose([p for _, p in candidates], probabilities[row, place, likeliest], rtol=1e-4)
    assert found != model.fill_mask(TEXTS, IMAGES[::-1], top_k=3)
    assert found != model.fill_mask(TEXTS, top_k=3)


def test_a_tokenizer_without_a_mask_token_is_told(model, tmp_path):
    text.train_bpe(["a red fox"], 300, tmp_path / "own.json")
    model.tokenizer = text.load(tmp_path / "own.json")
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        model.fill_mask("a [MASK] fox")
