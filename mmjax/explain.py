"""What a model saw: which patches of an image and which words of a text its answer rests on.

    images, texts = ["park.jpg"], ["a dog on grass"]
    found = mmjax.explain.relevance(model, images, texts)
    Image.fromarray(mmjax.explain.overlay(found[0].seen, found[0].image)).save("dog.png")
    print(found[0].text)

Attention rollout (Abnar & Zuidema 2020), attention across modalities, and gradient-weighted relevance (Chefer et al.
2021). docs/explanations.md says what they tell, and what they do not. All compute in float32.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image

from mmjax import api
from mmjax.api import LoadRows, Model
from mmjax.data import image as image_ops
from mmjax.data.pipeline import captions_of, decode_image
from mmjax.data.sources import open_entry
from mmjax.errors import UserError
from mmjax.models import variants
from mmjax.models.attention import ATTENTION, SHIFT
from mmjax.models.multimodal import MultimodalModel, Text
from mmjax.training.checkpoint import saved_steps

Heat = Float[np.ndarray, "rows columns"]  # a number for each patch
Tokens = list[tuple[str, float]]  # a text's tokens, each with a number
OVERLAY_SIDE = 224
COOL, WARM = np.array((30, 50, 140), np.float32), np.array((230, 60, 20), np.float32)


class Explanation(NamedTuple):
    """Of a pair of an image and a text.

    Attributes:
      seen: the image as the tower read it, uint8 [height, width, 3].
      image: the share of each patch in the relevance of all; they add up to 1, or are 0 where nothing is relevant. A
        class token has none.
      text: the tokens, without padding, each with its share of theirs.
      similarity: the cosine of the pair's embeddings.
    """

    seen: UInt8[np.ndarray, "height width 3"]
    image: Heat
    text: Tokens
    similarity: float


def relevance(
    model: Model,
    images: Sequence[Any],
    texts: Sequence[str],
    against: Sequence[str] | None = None,
    keep_shape: bool = False,
    batch_size: int = 64,
) -> list[Explanation]:
    """What makes image i and text i similar: patches of the one, tokens of the other.

    "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers" (Chefer, Gur &
    Wolf 2021), section 3.1 and equations 5 and 6. In each tower the relevance R of its inputs to its tokens starts as
    the identity, and each layer adds to it: R <- R + mean over heads of (gradient * attention)^+ R. The gradient is
    that of the cosine with the other tower's embedding. Pooling is a layer of attention too, with one query: that of
    "map", or equal weights on all tokens ("mean"); "cls" and "last" take their token's row of R.

    Args:
      model: has both towers.
      images: as in `Model.encode_image`.
      texts: as many.
      against: other texts, one for each pair: then the image's patches are those that speak for its text rather than
        for this one.
      keep_shape: whether to read an image in its own shape, its shorter side as long as in training, rather than as the
        model's evaluation does. Position embeddings are interpolated.
      batch_size: how many images of one shape at a time.

    Raises:
      UserError: the lists differ in length, or an image cannot be read.
    """
    _check_pairs(images, texts, against)
    for modality in ("image", "text"):
        model.needs(modality, f"encode an input of the modality {modality}")
    seen = _views(model, images, keep_shape)
    ids = _ids(model, texts)
    inputs = {"image": seen, "text": ids} | ({} if against is None else {"against": _ids(model, against)})
    found: list[Any] = [None] * len(seen)
    run = partial(_relevance, module=_module(model), mesh=model.mesh)
    for places in _by_shape(seen):
        loaders = _loaders(places, inputs)
        parts = [*model.batches(run, len(places), loaders, batch_size)]
        for place, *values in zip(places, *map(np.concatenate, zip(*parts, strict=True)), strict=True):
            patches, tokens, cosine = values
            heat = _shares(_heat(model, seen[place], patches))
            words = _shares(np.where(ids[place] == model.tokenizer.pad_id, 0, tokens[: len(ids[place])]))
            found[place] = Explanation(seen[place], heat, _named(model, ids[place], words), float(cosine))
    return found


@partial(jax.jit, static_argnames=("module", "mesh"))
def _relevance(params: PyTree, batch: dict[str, Array], module: MultimodalModel, mesh: Any) -> tuple:
    """Relevance of image tokens and of text tokens, and the cosine."""
    embeddings = {name: _encode(module, params, name, batch[name])["embedding"] for name in ("image", "text")}
    target = embeddings["text"]
    if "against" in batch:
        target = target - _encode(module, params, "text", batch["against"])["embedding"]
    patches = _tower_relevance(module, params, "image", batch["image"], target)
    tokens = _tower_relevance(module, params, "text", batch["text"], embeddings["image"])
    cosine = (embeddings["image"] * embeddings["text"]).sum(axis=-1)
    return _replicated((patches, tokens, cosine), mesh)


def _tower_relevance(module: MultimodalModel, params: PyTree, modality: str, inputs: Array, target: Array) -> Array:
    weights, valid = _attention(module, params, modality, inputs)

    def similarity(shift: PyTree) -> Array:
        encoded = module.apply({"params": params, SHIFT: shift}, modality, inputs, method="encode")
        return (encoded["embedding"] * target).sum()

    gradients = jax.grad(similarity)(jax.tree.map(jnp.zeros_like, weights))

    def positive(weights: Array, gradient: Array) -> Array:
        return nn.relu(weights * gradient).mean(axis=-3)  # over the heads

    def layer(weights: Array, so_far: Array) -> Array:
        return so_far + weights @ so_far

    return _pooled(jax.tree.map(positive, weights, gradients), layer, module, modality, valid)


def rollout(
    model: Model, modality: str, inputs: Sequence[Any], keep_shape: bool = False, batch_size: int = 64
) -> list[Heat] | list[Tokens]:
    """How attention passes a tower's inputs on to what it pools: of each image a number for each patch, of each text
    one for each token; they add up to 1, but for padding and class tokens, which are left out.

    "Quantifying Attention Flow in Transformers" (Abnar & Zuidema 2020), section 3: the product over the layers of the
    mean over heads of the attention, mixed half and half with the identity for the residual connection. It depends on
    the input alone, and not on what it is compared with.

    Args:
      model: has this tower.
      modality: "image" or "text".
      inputs: images as in `Model.encode_image`, or texts.
      keep_shape: see `relevance`.
      batch_size: how many of one shape at a time.
    """
    model.needs(modality, f"encode an input of the modality {modality}")
    read = _views(model, inputs, keep_shape) if modality == "image" else _ids(model, inputs)
    found: list[Any] = [None] * len(read)
    run = partial(_rollout, module=_module(model), mesh=model.mesh, modality=modality)
    for places in _by_shape(read):
        loaders = _loaders(places, {modality: read})
        shares = np.concatenate([*model.batches(run, len(places), loaders, batch_size)])
        for place, row in zip(places, shares, strict=True):
            show = _heat if modality == "image" else _named
            found[place] = show(model, read[place], row)
    return found


@partial(jax.jit, static_argnames=("module", "mesh", "modality"))
def _rollout(params: PyTree, batch: dict[str, Array], module: MultimodalModel, mesh: Any, modality: str) -> Array:
    weights, valid = _attention(module, params, modality, batch[modality])
    mean = jax.tree.map(lambda each: each.mean(axis=-3), weights)  # over the heads

    def layer(weights: Array, so_far: Array) -> Array:
        return (so_far + weights @ so_far) / 2

    return _replicated(_pooled(mean, layer, module, modality, valid), mesh)


def cross_attention(
    model: Model,
    images: Sequence[Any],
    texts: Sequence[str],
    part: str = "fusion",
    keep_shape: bool = False,
    batch_size: int = 64,
) -> list[list[tuple[str, Heat]]]:
    """Which patches of image i each token of text i reads: the tokens, each with its attention, the mean over layers
    and heads.

    Args:
      model: has that part.
      images: as in `Model.encode_image`.
      texts: as many.
      part: "fusion" (what matching reads): what the token's own place attends to; "decoder" (what captions): what the
        place attends to that predicts the token.
      keep_shape: see `relevance`.
      batch_size: how many images of one shape at a time.

    Raises:
      UserError: the lists differ in length, an image cannot be read, or the model has no such part.
    """
    _check_pairs(images, texts)
    parts = {"fusion": "match images and texts", "decoder": "caption images"}
    if part not in parts:
        raise UserError(f'part: "{part}" is neither fusion nor decoder')
    model.needs(part if part == "decoder" else "matching", parts[part])
    seen, ids = _views(model, images, keep_shape), _ids(model, texts)
    found: list[Any] = [None] * len(seen)
    run = partial(_cross_attention, module=_module(model), mesh=model.mesh, part=part)
    for places in _by_shape(seen):
        loaders = _loaders(places, {"image": seen, "text": ids})
        weights = np.concatenate([*model.batches(run, len(places), loaders, batch_size)])
        for place, rows in zip(places, weights, strict=True):
            own = ids[place][-len(rows) :]  # a start token that the decoder is given is not predicted
            named = _named(model, own, np.arange(len(own)))
            found[place] = [(name, _heat(model, seen[place], rows[row])) for name, row in named]
    return found


@partial(jax.jit, static_argnames=("module", "mesh", "part"))
def _cross_attention(params: PyTree, batch: dict[str, Array], module: MultimodalModel, mesh: Any, part: str) -> Array:
    ids, variables = batch["text"], {"params": params}
    (image, _), tower = module.apply(variables, "image", batch["image"], method="tokens", mutable=[ATTENTION])
    text = (
        Text(ids, *_apply(module, params, "tokens", "text", ids)) if "text" in module.parts else Text(ids, None, None)
    )
    method = {"fusion": "match", "decoder": "caption"}[part]
    _, seen = module.apply(variables, text, image, method=method, mutable=[ATTENTION])
    reads = module.config[part]["reads"]
    own = seen[ATTENTION]["text" if reads == "tower" else part]
    blocks = own["transformer"]["blocks"]
    if "cross_attention" in blocks:
        weights = blocks["cross_attention"]["weights"].mean(axis=(0, 2))  # over layers and heads
    else:  # the image stands before the text in one sequence
        count = ids.shape[1] if module.config["decoder"]["start"] else ids.shape[1] - 1
        all_places = blocks["attention"]["weights"].mean(axis=(0, 2))
        weights = all_places[:, -count:, :-count]
    if "image_queries" in own:
        weights = weights @ own["image_queries"]["attention"]["weights"].mean(axis=1)
    weights = jnp.pad(weights, ((0, 0), (0, 0), (image.shape[1] - weights.shape[2], 0)))  # a class token unseen
    if "queries" in tower[ATTENTION]["image"]:
        weights = weights @ tower[ATTENTION]["image"]["queries"]["attention"]["weights"].mean(axis=1)
    return _replicated(weights, mesh)


def overlay(
    seen: UInt8[np.ndarray, "height width 3"], heat: Heat, strength: float = 0.6
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """The image with a map over it: blue where the number of a patch is 0, red where it is largest.

    Args:
      seen: an image; small ones are enlarged, to a shorter side of 224.
      heat: a number for each patch, not negative; it is made smooth.
      strength: how much of the colour is the map's.
    """
    scale = max(1.0, OVERLAY_SIDE / min(seen.shape[:2]))
    size = (round(seen.shape[1] * scale), round(seen.shape[0] * scale))
    picture = np.asarray(Image.fromarray(seen).resize(size, Image.Resampling.BICUBIC), np.float32)
    smooth = Image.fromarray(heat.astype(np.float32) / max(heat.max(), 1e-12)).resize(size, Image.Resampling.BICUBIC)
    warmth = np.clip(np.asarray(smooth), 0, 1)[..., None]
    grey = picture.mean(axis=-1, keepdims=True)
    return np.round((1 - strength) * grey + strength * (COOL + (WARM - COOL) * warmth)).astype(np.uint8)


def beside_overlay(found: Explanation) -> UInt8[np.ndarray, "height 2*width 3"]:
    """The image, enlarged as `overlay` does, and to its right its overlay."""
    shown = overlay(found.seen, found.image)
    plain = Image.fromarray(found.seen).resize(shown.shape[1::-1], Image.Resampling.BICUBIC)
    return np.concatenate([np.asarray(plain), shown], axis=1)


def save(folder: Path, texts: Sequence[str], found: Sequence[Explanation], prefix: str = "") -> None:
    """Writes of each pair PREFIX + NUMBER.png, the image beside its overlay, and the same .json: the title, and the
    tokens with their shares over the largest of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (text, each) in enumerate(zip(texts, found, strict=True)):
        Image.fromarray(beside_overlay(each)).save(folder / f"{prefix}{number}.png")
        top = max((weight for _, weight in each.text), default=0) or 1
        tokens = [[name, round(weight / top, 4)] for name, weight in each.text]
        content = {"title": f"{text} (cosine {each.similarity:.3f})", "tokens": tokens}
        (folder / f"{prefix}{number}.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")


def save_of_run(workdir: Path, count: int = 6) -> None:
    """Explains some held-out pairs of a run's first retrieval evaluator by its last checkpoint.

    They are written into WORKDIR/eval/explanations, in place of those of an earlier checkpoint.

    Raises:
      UserError: the run has no checkpoint, no such evaluator, or no embeddings; or its data is not there.
    """
    folder, steps = workdir / "eval" / "explanations", saved_steps(workdir)
    prefix = f"{max(steps, default=0):08d}-"
    if steps and list(folder.glob(f"{prefix}*.json")):
        return
    entries = [entry for entry in api.load_config(workdir).evaluators.values() if entry.kind == "retrieval"]
    if not entries:
        raise UserError("the run has no retrieval evaluator, whose pairs would be explained")
    model, source = api.load(workdir), open_entry(entries[0])
    records = [source[int(place)] for place in np.linspace(0, len(source) - 1, min(count, len(source)))]
    texts = [captions_of(record, entries[0].captions)[0] for record in records]
    found = relevance(model, [decode_image(record) for record in records], texts)
    for old in folder.glob("*"):
        old.unlink()
    save(folder, texts, found, prefix)


def _check_pairs(images: Sequence[Any], *texts: Sequence[str] | None) -> None:
    for each in texts:
        if each is not None and len(each) != len(images):
            raise UserError(f"{len(images)} images and {len(each)} texts are no pairs")


def _module(model: Model) -> MultimodalModel:
    return model.module.clone(dtype=jnp.dtype("float32"))


def _ids(model: Model, texts: Sequence[str]) -> np.ndarray:
    return model.tokenizer.encode(list(texts), model.config.model.encoders.text.length)


def _patch(model: Model) -> int:
    return variants.parse(model.config.model.encoders.image.variant)[1]


def _views(model: Model, images: Sequence[Any], keep_shape: bool) -> list[UInt8[np.ndarray, "height width 3"]]:
    """The images as the tower is to read them."""
    encoder, patch, seen = model.config.model.encoders.image, _patch(model), []
    if encoder.max_patches:
        raise UserError("a model that reads images of any shape cannot be explained")
    for image in images:
        pixels = image_ops.pixels_of(image)
        if keep_shape:
            scale = encoder.image_size / min(pixels.shape[:2])
            height, width = (max(1, round(side * scale / patch)) * patch for side in pixels.shape[:2])
            resized = Image.fromarray(pixels).resize((width, height), image_ops.RESAMPLES[encoder.resample])
            seen.append(np.asarray(resized))
        else:
            seen.append(image_ops.for_evaluation(pixels, image_ops.fit_of(encoder)))
    return seen


def _by_shape(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The places of inputs of each shape."""
    shapes = np.array([each.shape for each in inputs], np.int64).reshape(len(inputs), -1)
    _, kinds = np.unique(shapes, axis=0, return_inverse=True)
    return [np.flatnonzero(kinds.ravel() == kind) for kind in range(kinds.max(initial=-1) + 1)]


def _loaders(places: np.ndarray, inputs: Mapping[str, Sequence[np.ndarray]]) -> dict[str, LoadRows]:
    """What loads of each input the rows that stand at these places."""

    def loader(values: Sequence[np.ndarray]) -> LoadRows:
        return lambda rows: np.stack([values[place] for place in places[rows]])

    return {name: loader(values) for name, values in inputs.items()}


def _apply(module: MultimodalModel, params: PyTree, method: str, *arguments: Any) -> Any:
    return module.apply({"params": params}, *arguments, method=method)


def _encode(module: MultimodalModel, params: PyTree, modality: str, inputs: Array) -> Mapping[str, Array]:
    return _apply(module, params, "encode", modality, inputs)


def _attention(module: MultimodalModel, params: PyTree, modality: str, inputs: Array) -> tuple[PyTree[Array], Any]:
    """The attention weights of a tower: of its blocks [layers, batch, heads, queries, keys], and of its pooling. Which
    of its tokens are no padding (None: all).
    """
    variables = {"params": params}
    found, seen = module.apply(variables, modality, inputs, method="encode", mutable=[ATTENTION])
    return seen[ATTENTION], found["valid"]


def _pooled(
    weights: PyTree[Array], layer: Callable, module: MultimodalModel, modality: str, valid: Array | None
) -> Array:
    """Passes the identity through the blocks, and takes what the pooling takes: [batch, tokens].

    `weights` and `valid` are those of `_attention`, without heads; `layer(weights, so far)` is one block.
    """
    tower, pooling = weights[modality], module.config["encoders"][modality]["pooling"]
    (blocks,), pool = jax.tree.leaves(tower["transformer"]), jax.tree.leaves(tower.get("pool"))
    so_far = jnp.broadcast_to(jnp.eye(blocks.shape[-1]), blocks.shape[1:])
    for each in blocks:
        so_far = layer(each, so_far)
    if "queries" in tower:
        so_far = jax.tree.leaves(tower["queries"])[0] @ so_far
    if pool:
        return (pool[0] @ so_far)[:, 0]
    if pooling == "eos":
        return jnp.take_along_axis(so_far, valid.sum(axis=1)[:, None, None] - 1, axis=1)[:, 0]
    return so_far[:, {"cls": 0, "last": -1}[pooling]]


def _replicated(tree: PyTree[Array], mesh: Any) -> PyTree[Array]:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def _shares(numbers: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
    return numbers / max(numbers.sum(), 1e-30)


def _heat(model: Model, seen: UInt8[np.ndarray, "height width 3"], tokens: Float[np.ndarray, " tokens"]) -> Heat:
    """The numbers of an image's patches, as they lie; a class token's is left out."""
    patch = _patch(model)
    rows, columns = seen.shape[0] // patch, seen.shape[1] // patch
    return tokens[-rows * columns :].reshape(rows, columns)


def _named(model: Model, ids: np.ndarray, numbers: Float[np.ndarray, " tokens"]) -> Tokens:
    """The tokens with their numbers, but padding and the class token after them."""
    tokenizer = model.tokenizer
    special = {tokenizer.end_id: "[end]", tokenizer.start_id: "[start]"}
    pairs = zip(ids.tolist(), numbers[: len(ids)].tolist(), strict=True)
    return [(special.get(token) or tokenizer.decode([token]), x) for token, x in pairs if token != tokenizer.pad_id]
