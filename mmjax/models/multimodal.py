"""Towers over a shared embedding space, and what is built on top of them.

An encoder maps one modality's input to tokens and pools them; the model projects what is pooled
into the shared space and normalises it. A modality is an embedding of its own in `ENCODERS`; the
Transformer behind it is shared code.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from mmjax.models import variants
from mmjax.models.decoder import Decoder
from mmjax.models.fusion import Fusion
from mmjax.models.patch import PatchEmbed, normalize
from mmjax.models.pooling import Pool, Queries
from mmjax.models.position import ImagePosition
from mmjax.models.text import TextEmbed
from mmjax.models.token_drop import drop_tokens, kept_places
from mmjax.models.transformer import Style, Transformer, layer_norm
from mmjax.sharding.rules import constrain

MAX_LOGIT_SCALE = 100.0
PARTS = ("image", "text", "fusion", "matching", "masked", "decoder")  # what a model can be built of


def tower_size(encoder: Mapping[str, Any]) -> variants.Size:
    """The dimensions of a tower: those of its variant, where the config does not set its own."""
    named = variants.parse(encoder["variant"])[0]
    return variants.Size(*(encoder[name] or getattr(named, name) for name in variants.Size._fields))


def output_width(encoder: Mapping[str, Any]) -> int:
    """How wide the tokens are that a tower returns."""
    return encoder.get("query_width", 0) or tower_size(encoder).width


def part_size(part: Mapping[str, Any], text: variants.Size) -> dict[str, Any]:
    """The settings of a fusion or decoder; what is 0 there is as in the text tower."""
    return {**part, **{name: part[name] or getattr(text, name) for name in ("width", "heads", "mlp_dim")}}


def style_of(encoder: Mapping[str, Any]) -> Style:
    """What kind of Transformer a tower is."""
    return Style(*(encoder[f"norm_{name}" if name == "epsilon" else name] for name in Style._fields))


def _transformer(encoder: Mapping[str, Any], dtype: jnp.dtype) -> Transformer:
    size = tower_size(encoder)
    return Transformer(
        size.depth, size.heads, size.mlp_dim, encoder["remat"], encoder["unroll"], dtype, style=style_of(encoder)
    )


def _pool(encoder: Mapping[str, Any], dtype: jnp.dtype) -> Pool:
    size, settings = tower_size(encoder), (encoder["pool_norm"], encoder["pool_dense"])
    heads = size.heads
    if encoder["pooling"] == "query":
        heads, settings = encoder["query_heads"] or heads, (*settings, encoder["query_norm"])
    has_class_token = encoder.get("class_token", False)
    return Pool(encoder["pooling"], heads, size.mlp_dim, dtype, style_of(encoder), has_class_token, *settings)


class ImageEncoder(nn.Module):
    """A vision Transformer (Dosovitskiy et al. 2021). Fields: `mmjax.config.image_encoder`.

    With a key for each row (in training), `token_drop` of the patches are left out.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config, width = self.config, tower_size(self.config).width
        self.patch = variants.parse(config["variant"])[1]
        self.patches = PatchEmbed(self.patch, width, self.dtype, config["patch_bias"])
        self.has_class_token = config["class_token"] or config["pooling"] == "cls"
        if self.has_class_token:
            self.class_token = self.param("class_token", nn.initializers.zeros, (1, width))
        trained = (config["image_size"] // self.patch,) * 2
        self.positions = ImagePosition(config["position"], trained, self.has_class_token)
        if config["embed_norm"]:
            self.embed_norm = layer_norm(None, self.dtype, style_of(config))
        self.transformer = _transformer(config, self.dtype)
        if config["queries"]:
            heads = config["query_heads"] or tower_size(config).heads
            style, norm = style_of(config), config["query_norm"]
            self.queries = Queries(config["queries"], output_width(config), heads, self.dtype, style, norm)
        self.pool = _pool(config, self.dtype)

    def __call__(
        self, image: UInt8[Array, "batch height width 3"], rng: Key[Array, " batch"] | None = None
    ) -> tuple[Float[Array, "batch tokens embed"], None]:
        """The tokens, and None: all of them are valid."""
        config = self.config
        x = self.patches(normalize(image, config["mean"], config["std"], self.dtype))
        grid = (image.shape[1] // self.patch, image.shape[2] // self.patch)
        if self.has_class_token:
            token = jnp.broadcast_to(self.class_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        x = self.positions(x, grid)
        x = self.embed_norm(x) if config["embed_norm"] else x
        if rng is not None and config["token_drop"]:
            x = drop_tokens(x, rng, config["token_drop"], always_kept=int(self.has_class_token))
        x = self.transformer(x)
        return self.queries(x) if config["queries"] else x, None


class TextEncoder(nn.Module):
    """A text Transformer over token ids. Fields: `mmjax.config.text_encoder`.

    A `class_token` stands after the text, the last of the tower's tokens. With `shifted_mask` the mask of padding begins
    with its place instead of ending with it: a token may be attended to if the id before it is no padding.

    With a key for each row (in training), `token_drop` of the tokens are left out, padding first.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config, width = self.config, tower_size(self.config).width
        style, types = style_of(config), config["token_types"]
        places = config["length"] + config["class_token"]
        self.embed = TextEmbed(config["vocab_size"], places, width, self.dtype, style, types)
        if config["class_token"]:
            self.class_token = self.param("class_token", nn.initializers.normal(0.01), (1, width))
        self.transformer = _transformer(config, self.dtype)
        self.pool = _pool(config, self.dtype)

    def __call__(
        self, text: Int[Array, "batch length"], rng: Key[Array, " batch"] | None = None
    ) -> tuple[Float[Array, "batch tokens embed"], Bool[Array, "batch tokens"] | None]:
        """The tokens, and which of them are no padding (None: padding is part of the input)."""
        config, x = self.config, self.embed(text)
        valid = None
        if config["mask_padding"]:
            valid = text != config["pad_id"]
        elif config["pooling"] == "eos":  # up to the first end token; what comes after it is padding, whatever its id
            ends = (text == config["end_id"]).astype(jnp.int32)
            valid = jnp.cumsum(ends, axis=1) - ends == 0
        if config["class_token"]:
            x = jnp.concatenate([x, self._class_tokens(*text.shape)], axis=1)
            if valid is not None:
                own = jnp.ones((len(text), 1), bool)
                valid = jnp.concatenate([own, valid] if config["shifted_mask"] else [valid, own], axis=1)
        if rng is not None and config["token_drop"]:
            places = kept_places(rng, x.shape[1], config["token_drop"], int(config["pooling"] == "cls"), valid)
            x = jnp.take_along_axis(x, places[..., None], axis=1)
            valid = None if valid is None else jnp.take_along_axis(valid, places, axis=1)
        mask = None if valid is None else valid[:, None, None, :]
        if config["causal"]:
            causal = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
            mask = causal if mask is None else mask & causal
        return self.transformer(x, mask), valid

    def _class_tokens(self, batch: int, length: int) -> Float[Array, "batch 1 embed"]:
        token = self.embed.blank(self.class_token, 1, first=length)
        return jnp.broadcast_to(token, (batch, *token.shape[1:]))

    def empty_cache(self, batch: int) -> PyTree[Array]:
        """What `step` starts from."""
        return self.transformer.empty_cache(batch, self.config["length"], tower_size(self.config).width)

    def step(
        self, token: Int[Array, " batch"], position: Int[Array, ""], cache: PyTree[Array]
    ) -> tuple[Float[Array, "batch 1 embed"], PyTree[Array]]:
        """The tower's token of one more id, where the tower is causal."""
        mask = (jnp.arange(self.config["length"]) <= position)[None, None, None]
        return self.transformer(self.embed(token[:, None], position), mask, None, cache, position)


ENCODERS = {"image": ImageEncoder, "text": TextEncoder}


class Text(NamedTuple):
    """A batch of texts: ids, the tower's tokens of them (None where nobody reads them), which are no padding.

    A class token may follow the others; nothing but the tower's own pooling reads it.
    """

    ids: Int[Array, "batch length"]
    tokens: Float[Array, "batch tokens embed"] | None
    valid: Bool[Array, "batch tokens"] | None

    def without_class_token(self) -> "Text":
        """The ids' tokens alone."""
        length = self.ids.shape[1]
        return Text(self.ids, *(None if each is None else each[:, :length] for each in self[1:]))


class MultimodalModel(nn.Module):
    """The towers of `config.encoders`, what compares their embeddings, and what reads their tokens.

    Only `parts` are built. `logit_scale` is stored as its logarithm and clamped at 100 (CLIP, Radford et al. 2021,
    section 2.5).
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32
    parts: Collection[str] = ("image", "text")
    parallel: bool = False  # whether the decoder also predicts all tokens at once

    def setup(self):
        encoders = {name: encoder for name, encoder in self.config["encoders"].items() if name in self.parts}
        self.towers = {name: ENCODERS[name](encoder, self.dtype, name=name) for name, encoder in encoders.items()}
        self.projections = {
            modality: nn.Dense(
                self.config["embed_dim"], encoder["projection_bias"], dtype=self.dtype, name=f"{modality}_projection"
            )
            for modality, encoder in encoders.items()
            if encoder["projection"]
        }
        scale, bias = self.config["logit_scale"], self.config["logit_bias"]
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(scale)), ())
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(bias), ())
        text = self.config["encoders"].get("text")
        style = style_of(text)._replace(final_norm=True) if text else None  # whatever is read of the text tower
        if "fusion" in self.parts:
            config = part_size(self.config["fusion"], tower_size(text))
            self.fusion = Fusion(config, text["vocab_size"], self.dtype, style)
        if "decoder" in self.parts:
            config = part_size(self.config["decoder"], tower_size(text)) | {"parallel": self.parallel}
            self.decoder = Decoder(config, text["vocab_size"], text["length"], self.dtype, style)

    def encode(self, modality: str, inputs: Array, rng: Key[Array, " batch"] | None = None) -> dict[str, Array]:
        """`tokens`, `valid` (of the tokens; None for all), `pooled`, `projected`, and `embedding`.

        `rng` has a key for each row in training; without one nothing is random.
        """
        tokens, valid = self.tokens(modality, inputs, rng)
        return {"tokens": tokens, "valid": valid, **self.embed(modality, tokens, valid)}

    def tokens(self, modality: str, inputs: Array, rng: Key[Array, " batch"] | None = None) -> tuple[Array, Any]:
        """What the tower makes of its input, and which of the tokens are no padding (None: all)."""
        if rng is not None:  # towers draw apart from each other
            rng = jax.vmap(jax.random.fold_in, (0, None))(rng, sorted(self.config["encoders"]).index(modality))
        return self.towers[modality](inputs, rng)

    def embed(self, modality: str, tokens: Array, valid: Array | None) -> dict[str, Array]:
        """`pooled` tokens; `projected` into the shared space, float32 [batch, embed_dim]; `embedding`: of unit norm."""
        pooled = self.towers[modality].pool(tokens, valid)
        projected = self.projections[modality](pooled) if modality in self.projections else pooled
        projected = projected.astype(jnp.float32)
        norm = jnp.sqrt(jnp.maximum((projected**2).sum(axis=-1, keepdims=True), 1e-12))
        embedding = constrain(projected / norm, "batch", "embed")
        return {"pooled": pooled, "projected": projected, "embedding": embedding}

    def logits(self) -> dict[str, Float[Array, ""]]:
        """`logit_scale` (not its logarithm) and `logit_bias`."""
        scale = jnp.exp(jnp.minimum(self.logit_scale, np.log(MAX_LOGIT_SCALE)))
        return {"logit_scale": scale, "logit_bias": self.logit_bias}

    def match(self, text: Text, image: Float[Array, "batch tokens embed"]) -> Float[Array, "batch 2"]:
        """Logits of "does not belong" and "belongs" for pairs of a text and an image's tokens."""
        text = text.without_class_token()
        return self.fusion.match(self._fuse(text, image), text.valid)

    def predict(
        self, text: Text, image: Float[Array, "batch tokens embed"] | None
    ) -> Float[Array, "batch tokens vocab"]:
        """Logits of the token at each place."""
        return self.fusion.predict(self._fuse(text, image), self.towers["text"].embed.table())

    def _fuse(self, text: Text, image: Array | None) -> Array:
        text = text.without_class_token()
        if self.config["fusion"]["reads"] == "embedding":
            return self.fusion(self.towers["text"].embed(text.ids), text.valid, image)
        return self.fusion(text.tokens, text.valid, image)

    def caption(
        self,
        text: Text,
        image: Float[Array, "batch tokens embed"],
        parallel: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch slots vocab"]:
        """The decoder's logits: see `Decoder`."""
        text, reads_ids = text.without_class_token(), self.config["decoder"]["reads"] == "embedding"
        return self.decoder(text.ids if reads_ids else text.tokens, image, parallel)

    def begin_caption(
        self, image: Float[Array, "batch tokens embed"], first: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch vocab"], PyTree[Array]]:
        """Logits of the first token, or of the second where texts begin with the start token `first`; and the cache."""
        cache = {}
        if self.config["decoder"]["reads"] == "text":
            cache["text"] = self.towers["text"].empty_cache(image.shape[0])
            if not self.config["decoder"]["start"]:
                first, cache["text"] = self.towers["text"].step(first, jnp.zeros((), jnp.int32), cache["text"])
        logits, cache["decoder"] = self.decoder.begin(image, first)
        return logits, cache

    def continue_caption(
        self, ids: Int[Array, " batch"], slot: Int[Array, ""], cache: PyTree[Array]
    ) -> tuple[Float[Array, "batch vocab"], PyTree[Array]]:
        """Logits of the token after `ids`, which stand in this slot (from 1 on: see `Decoder`); and the cache."""
        token, cache = ids, dict(cache)
        if "text" in cache:
            position = slot - 1 if self.config["decoder"]["start"] else slot
            token, cache["text"] = self.towers["text"].step(ids, position, cache["text"])
        logits, cache["decoder"] = self.decoder.step(token, slot, cache["decoder"])
        return logits, cache

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Runs every part once, to initialise it; returns `encode` of each modality and the logit parameters."""
        out: dict[str, Any] = {name: self.encode(name, batch[name]) for name in self.towers}
        image = out["image"]["tokens"] if "image" in out else None
        text = Text(batch.get("text"), *(out.get("text", {}).get(name) for name in ("tokens", "valid")))
        if "matching" in self.parts:
            self.match(text, image)
        if "masked" in self.parts:
            self.predict(text, image)
        if "decoder" in self.parts:
            self.caption(text, image, jnp.zeros(len(text.ids), bool) if self.parallel else None)
        return {**out, **self.logits()}
