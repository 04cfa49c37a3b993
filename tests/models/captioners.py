"""Small models with a decoder, their logits computed the plain way: all of a text at once."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from mmjax import config as configs
from mmjax.models.multimodal import MultimodalModel, Text
from mmjax.sharding.rules import path_name

PAD, END = 0, 1
IMAGE_TOKENS, IMAGE_WIDTH = 3, 8


@cache
def module(vocab_size=7, length=6, norm="pre", **decoder):
    """A model of one-layer towers, two decoder layers, and fields of `mmjax.config.decoder`."""
    tower = {"width": 8, "depth": 1, "heads": 2, "mlp_dim": 16, "norm": norm}
    text = configs.text_encoder(
        **tower, vocab_size=vocab_size, length=length, pooling="mean", causal=True, mask_padding=True
    )
    config = configs.default().model
    config.encoders = {"image": configs.image_encoder(**tower, variant="B/4", image_size=8), "text": text}
    config.decoder = configs.decoder(depth=2, **decoder)
    parts = ("image", "text", "decoder") if config.decoder.reads == "text" else ("image", "decoder")
    return MultimodalModel(FrozenDict(config.to_dict()), parts=parts)


@cache
def shapes(module):
    """The shapes of its parameters."""
    length = module.config["encoders"]["text"]["length"]
    batch = {"image": jnp.zeros((1, 8, 8, 3), jnp.uint8), "text": jnp.ones((1, length), jnp.int32)}
    return jax.eval_shape(module.init, jax.random.key(0), batch)["params"]


def parameters(module, seed=0, size=0.6):
    """Random parameters of one size, so that everything in the model matters; normalisations scale by about 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.float32(rng.normal(1.0 if path_name(path).endswith("scale") else 0.0, size, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes(module))


def image_tokens(rows, seed=0):
    """What an image tower might have returned."""
    return jnp.float32(np.random.default_rng(seed + 100).normal(size=(rows, IMAGE_TOKENS, IMAGE_WIDTH)))


@partial(jax.jit, static_argnums=0)
def logits(module, params, image, ids):
    """Logits of the token at each place, [rows, places, vocab]: of the last places where the first has none."""
    known = {"params": params}
    tokens = module.apply(known, "text", ids, method="tokens")[0] if "text" in module.parts else None
    return module.apply(known, Text(ids, tokens, None), image, method="caption")


def log_probabilities(module, params, image, ids):
    """Of the token at each place of the texts, [rows, length, vocab], padding left out; zeros before the first."""
    found = logits(module, params, image, ids).at[..., PAD].set(-jnp.inf)
    found = np.asarray(jax.nn.log_softmax(found))
    return np.pad(found, ((0, 0), (ids.shape[1] - found.shape[1], 0), (0, 0)))


def scores(module, params, image, ids, prompt_length):
    """(sum of the log-probabilities of each text's tokens after its prompt, how many these are)."""
    places, ids = np.arange(ids.shape[1]), np.asarray(ids)
    own = np.take_along_axis(log_probabilities(module, params, image, ids), ids[..., None], axis=2)[..., 0]
    counted = (places >= np.asarray(prompt_length)[:, None]) & (ids != PAD)
    return np.where(counted, own, 0).sum(axis=1), counted.sum(axis=1)
