"""Objectives on small models whose weights and inputs are drawn by numpy, for comparison with other implementations."""

from collections.abc import Callable, Mapping
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from mmjax import config as configs
from mmjax.models.multimodal import MultimodalModel, Text
from mmjax.models.outputs import Outputs
from mmjax.objectives import captioning, contrastive, masked, matching

ROWS, LENGTH, VOCAB = 6, 9, 97
WIDTH, HEADS, MLP_DIM, LAYERS = 32, 4, 64, 2
IMAGE_TOKENS, IMAGE_WIDTH = 7, 24
PAD, START, END, MASK = 0, 1, 2, 3
SIZES = {"variant": "Ti", "width": WIDTH, "heads": HEADS, "mlp_dim": MLP_DIM}
BERT = {"norm": "post", "norm_epsilon": 1e-12, "activation": "gelu", "mask_padding": True, "pad_id": PAD}
LABEL_SMOOTHING = 0.1
COCA_WEIGHTS = {"captioning": 2.0, "contrastive": 1.0}

Flat = dict[str, np.ndarray]


class Case(NamedTuple):
    """An objective as a function of the weights, which are drawn, and what it was given."""

    weights: Flat
    loss: Callable[[Mapping], jax.Array]
    inputs: Flat
    # Of whole models: what a loss of embeddings and logits reads, as a function of the weights.
    features: Callable[[Mapping], Mapping[str, jax.Array]] | None = None


def draw(seed: int) -> np.random.RandomState:
    """Random numbers that are the same in every version of numpy."""
    return np.random.RandomState(seed)


def draw_weights(shapes: Mapping, seed: int) -> Flat:
    """Weights of these shapes, none of which leaves a layer without effect."""
    random, weights = draw(seed), {}
    for path, shape in sorted(flatten_dict(shapes, sep="/").items()):
        values = random.normal(size=shape.shape)
        kind = path.rpartition("/")[2]
        if kind == "kernel":
            values *= shape.shape[-2] ** -0.5
        elif kind == "scale":
            values = 1 + 0.1 * values
        else:
            values *= 0.3
        weights[path] = values.astype(np.float32)
    return weights


def as_tree(weights: Flat) -> dict:
    """The weights as models take them."""
    return jax.tree.map(jnp.asarray, unflatten_dict(weights, sep="/"))


def texts(random: np.random.RandomState) -> np.ndarray:
    """Ids of texts of all lengths, with start, end and padding."""
    ids = random.randint(MASK + 1, VOCAB, size=(ROWS, LENGTH))
    ids[:, 0] = START
    for row, length in zip(ids, [LENGTH, 3, 5, LENGTH - 1, 2, 6], strict=True):
        row[length - 1 :] = [END] + [PAD] * (LENGTH - length)
    return ids.astype(np.int32)


def texts_and_images(seed: int) -> Flat:
    """Texts and the tokens of images."""
    random = draw(seed)
    image = random.normal(size=(ROWS, IMAGE_TOKENS, IMAGE_WIDTH)).astype(np.float32)
    return {"text": texts(random), "image": image}


def build(parts: tuple[str, ...], text: dict, **settings) -> MultimodalModel:
    """A model with a text tower of these settings, beside what `settings` holds."""
    model = configs.default().model
    model.encoders.text = configs.text_encoder(**SIZES | {"vocab_size": VOCAB, "length": LENGTH} | text)
    model.encoders.update(settings.pop("encoders", {}))
    model.update(settings)
    return MultimodalModel(FrozenDict(model.to_dict()), parts=parts)


def shapes_of(module: MultimodalModel, *arguments, method: str = "__call__") -> Mapping:
    """The shapes of the weights that a method reads."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, method=method))["params"]


def keys() -> jax.Array:
    """A key for each row; nothing here depends on them."""
    return jax.random.split(jax.random.key(0), ROWS)


def image_text_matching() -> Case:
    """The pairs are settled by the embeddings: the text of row i is like image i - 1 and no other."""
    module = build(
        ("text", "fusion", "matching"),
        BERT | {"depth": 1},
        fusion=configs.fusion(depth=LAYERS, reads="embedding", pooling="cls"),
    )
    given = texts_and_images(1)
    ids, image, places = jnp.asarray(given["text"]), jnp.asarray(given["image"]), np.arange(ROWS)
    valid = ids != PAD
    known = {
        "image": {"tokens": image, "embedding": jnp.eye(ROWS)},
        "text": {"tokens": None, "valid": valid, "embedding": jnp.roll(jnp.eye(ROWS), 1, axis=0)},
        "logit_scale": jnp.float32(1e4),
    }

    def loss(params):
        outputs = Outputs(module, params, {"text": ids}, known)
        return matching.matching(outputs, {"text": ids, "rng": keys()}, None)[0]

    shapes = shapes_of(module, Text(ids, None, valid), image, method="match")
    wrong = {"wrong_text": np.roll(places, -1), "wrong_image": np.roll(places, 1)}
    return Case(draw_weights(shapes, 10), loss, given | wrong)


def text_of_image() -> Case:
    """The captioner of BLIP (Li et al. 2022, section 3.2)."""
    module = build(
        ("decoder",),
        BERT,
        decoder=configs.decoder(depth=LAYERS, reads="embedding", start=False, tied=True, transform=True),
    )
    given = texts_and_images(2)
    ids, image = given["text"], given["image"]

    def loss(params):
        outputs = Outputs(module, params, {"text": ids}, {"image": {"tokens": image}})
        batch = {"text": ids, "rng": keys()}
        return captioning.captioning(outputs, batch, None, label_smoothing=LABEL_SMOOTHING)[0]

    shapes = shapes_of(module, Text(ids, None, ids != PAD), image, method="caption")
    return Case(draw_weights(shapes, 20), loss, given)


def masked_language() -> Case:
    """The text tower is the first layer, the fusion the others ("Align before Fuse", Li et al. 2021, section 3.1)."""
    module = build(
        ("text", "fusion", "masked"),
        BERT | {"depth": 1, "pooling": "cls", "projection": False},
        fusion=configs.fusion(depth=LAYERS, reads="text", pooling="cls"),
    )
    ids, random = texts_and_images(3)["text"], draw(30)
    chosen = (random.uniform(size=ids.shape) < 0.4) & (ids > MASK)
    fate = random.uniform(size=ids.shape)
    others = random.randint(MASK + 1, VOCAB, size=ids.shape)
    hidden = np.where(chosen, np.where(fate < 0.6, MASK, np.where(fate < 0.8, others, ids)), ids).astype(np.int32)

    def loss(params):
        outputs = Outputs(module, params, {"text": ids})
        with (
            mock.patch.object(masked, "choose_words", return_value=jnp.asarray(chosen)),
            mock.patch.object(masked, "hide", return_value=jnp.asarray(hidden)),
        ):
            return masked.masked(outputs, {"text": ids, "rng": keys()}, None)[0]

    given = {"text": ids, "chosen": chosen, "hidden": hidden}
    return Case(draw_weights(shapes_of(module, {"text": ids}), 31), loss, given)


def coca() -> Case:
    """Whole towers: the image's, the causal text tower, and a decoder that reads both."""
    image = configs.image_encoder(**SIZES | {"variant": "Ti/14"}, depth=1, image_size=28, pooling="map")
    module = build(
        ("image", "text", "decoder"),
        {"depth": 1, "pooling": "last", "causal": True, "pad_id": PAD},
        encoders={"image": image},
        decoder=configs.decoder(depth=LAYERS, reads="text", start=False, image_queries=3),
        embed_dim=16,
    )
    random = draw(4)
    batch = {"text": texts(random), "image": random.randint(0, 256, size=(ROWS, 28, 28, 3)).astype(np.uint8)}

    def loss(params):
        outputs = Outputs(module, params, batch)
        captions = captioning.captioning(outputs, batch | {"rng": keys()}, None)[0]
        pairs = contrastive.softmax(outputs, batch, None)[0]
        return COCA_WEIGHTS["captioning"] * captions + COCA_WEIGHTS["contrastive"] * pairs

    def features(params):
        outputs = Outputs(module, params, batch)
        return {
            "image_features": outputs["image"]["embedding"],
            "text_features": outputs["text"]["embedding"],
            "logits": outputs.caption(outputs.text, outputs["image"]["tokens"]),
            "logit_scale": outputs["logit_scale"],
        }

    return Case(draw_weights(shapes_of(module, batch), 40), loss, batch, features)


CASES = {
    "image_text_matching": image_text_matching,
    "captioning": text_of_image,
    "masked_language": masked_language,
    "coca": coca,
}


def value_and_gradient(case: Case) -> tuple[float, Flat]:
    """mmjax's loss, and its gradient with respect to every weight."""
    loss, gradient = jax.jit(jax.value_and_grad(case.loss))(as_tree(case.weights))
    return float(loss), {path: np.asarray(value) for path, value in flatten_dict(gradient, sep="/").items()}


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """The same trees, but for rounding."""
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(mine - other) <= tolerance * np.linalg.norm(other) + 1e-6
