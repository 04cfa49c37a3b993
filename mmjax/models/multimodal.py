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

from mmjax.errors import UserError
from mmjax.models import variants
from mmjax.models.audio import AudioEmbed
from mmjax.models.decoder import Decoder
from mmjax.models.fusion import Fusion
from mmjax.models.patch import PatchEmbed, normalize
from mmjax.models.pooling import ONE_TOKEN, Pool, Queries, place
from mmjax.models.position import ImagePosition, Relative, RelativePosition
from mmjax.models.text import TextEmbed, TokenHead
from mmjax.models.token_drop import drop_tokens, kept_places
from mmjax.models.transformer import Style, Transformer, layer_norm
from mmjax.sharding.rules import constrain

# What a model can be built of.
PARTS = ("image", "text", "audio", "fusion", "matching", "masked", "decoder", "classifier", "image_tokens")
CLASSIFIER_READS = ("pooled", "class_and_mean")


def tower_size(encoder: Mapping[str, Any]) -> variants.Size:
    """The dimensions of a tower: those of its variant, where the config does not set its own."""
    named = variants.parse(encoder["variant"])[0]
    return variants.Size(*(encoder[name] or getattr(named, name) for name in variants.Size._fields))


def output_width(encoder: Mapping[str, Any]) -> int:
    """How wide the tokens are that a tower returns."""
    return encoder.get("query_width", 0) or tower_size(encoder).width


def audio_samples(encoder: Mapping[str, Any]) -> int:
    """How many samples an audio tower reads at a time."""
    return encoder["sample_rate"] * encoder["seconds"]


def audio_tokens(encoder: Mapping[str, Any]) -> int:
    """How many tokens an audio tower makes of them."""
    return -(-(audio_samples(encoder) // encoder["hop"]) // 2)


def part_size(part: Mapping[str, Any], text: variants.Size) -> dict[str, Any]:
    """The settings of a fusion or decoder; what is 0 there is as in the text tower."""
    return {**part, **{name: part[name] or getattr(text, name) for name in ("width", "heads", "mlp_dim")}}


def style_of(encoder: Mapping[str, Any]) -> Style:
    """What kind of Transformer a tower is."""
    return Style(*(encoder[f"norm_{name}" if name == "epsilon" else name] for name in Style._fields))


def has_class_token(encoder: Mapping[str, Any]) -> bool:
    """Whether an image tower's first token is one of no patch."""
    return encoder["class_token"] or encoder["pooling"] == "cls"


def position_grid(encoder: Mapping[str, Any]) -> tuple[int, int]:
    """The rows and columns of patches that an image tower's learned positions are made for."""
    return ((encoder["position_size"] or encoder["image_size"]) // variants.parse(encoder["variant"])[1],) * 2


def positions_of(text: Mapping[str, Any]) -> int:
    """How many positions a text can have."""
    return text["positions"] or text["length"]


def ignores_padding(text: Mapping[str, Any]) -> bool:
    """Whether a text tower makes the same of a text however much padding follows it."""
    return (text["causal"] and text["pooling"] == "eos") or (text["mask_padding"] and text["pooling"] != "last")


def _transformer(
    encoder: Mapping[str, Any], dtype: jnp.dtype, cross: bool = False, relative: Relative | None = None
) -> Transformer:
    size, style = tower_size(encoder), style_of(encoder)
    return Transformer(
        size.depth,
        size.heads,
        size.mlp_dim,
        encoder["remat"],
        encoder["unroll"],
        dtype,
        cross,
        style=style,
        relative=relative,
    )


def _pool(encoder: Mapping[str, Any], dtype: jnp.dtype) -> Pool:
    size, settings = tower_size(encoder), (encoder["pool_norm"], encoder["pool_dense"])
    heads = size.heads
    if encoder["pooling"] == "query":
        heads, settings = encoder.get("query_heads") or heads, (*settings, encoder.get("query_norm", "output"))
    style, class_token = style_of(encoder), encoder.get("class_token", False)
    return Pool(encoder["pooling"], heads, size.mlp_dim, dtype, style, class_token, *settings)


class ImageEncoder(nn.Module):
    """A vision Transformer (Dosovitskiy et al. 2021). Fields: `mmjax.config.image_encoder`.

    With a key for each row (in training), `token_drop` of the patches are left out.

    With `max_patches` an input is the dictionary of patches and shapes of `mmjax.data.image_reader.Reader`: images of
    any shape (NaFlex: "SigLIP 2", Tschannen et al. 2025, section 2.4.2).
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config, (width, _, _, heads) = self.config, tower_size(self.config)
        self.patch = variants.parse(config["variant"])[1]
        self.patches = PatchEmbed(self.patch, width, self.dtype, config["patch_bias"])
        self.has_class_token = has_class_token(config)
        if self.has_class_token:
            self.class_token = self.param("class_token", nn.initializers.zeros, (1, width))
        if config["mask_token"]:
            self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, width))
        self.positions = ImagePosition(
            config["position"], position_grid(config), self.has_class_token, config["position_interpolation"]
        )
        self.relative = Relative((config["image_size"] // self.patch,) * 2, self.has_class_token)
        if config["relative_position"] == "shared":
            self.relative_position = RelativePosition(self.relative, heads)
        if config["embed_norm"]:
            self.embed_norm = layer_norm(None, self.dtype, style_of(config))
        self.transformer = _transformer(
            config, self.dtype, relative=self.relative if config["relative_position"] == "layer" else None
        )
        if config["queries"]:
            style, norm = style_of(config), config["query_norm"]
            query_heads = config["query_heads"] or heads
            self.queries = Queries(config["queries"], output_width(config), query_heads, self.dtype, style, norm)
        self.pool = _pool(config, self.dtype)

    def __call__(
        self,
        image: UInt8[Array, "batch height width 3"] | Mapping[str, Array],
        rng: Key[Array, " batch"] | None = None,
        masked: Bool[Array, "batch patches"] | None = None,
        pooled_only: bool = False,
    ) -> tuple[Float[Array, "batch tokens embed"], Bool[Array, "batch tokens"] | None]:
        """The tokens, and which of them are no padding (None: all). Of patches that are `masked` only the places are
        known. With `pooled_only` there is one token, that which is pooled.

        Raises:
          UserError: the image is of another size than the relative positions.
        """
        config = self.config
        if config["max_patches"]:
            return self._of_patches(**image)
        x = self.patches(normalize(image, config["mean"], config["std"], self.dtype))
        grid = (image.shape[1] // self.patch, image.shape[2] // self.patch)
        if config["relative_position"] and grid != self.relative.grid:
            size = config["image_size"]
            raise UserError(
                f"an image of {image.shape[1]}x{image.shape[2]} pixels: relative positions are those of {size}x{size}"
            )
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask_token.astype(x.dtype), x)
        if self.has_class_token:
            token = jnp.broadcast_to(self.class_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        x = self.positions(x, grid)
        x = self.embed_norm(x) if config["embed_norm"] else x
        if rng is not None and config["token_drop"]:
            x = drop_tokens(x, rng, config["token_drop"], always_kept=int(self.has_class_token))
        bias = self.relative_position() if config["relative_position"] == "shared" else None
        read = place(config["pooling"], x.shape[1], x.shape[0], None) if pooled_only else None
        x = self.transformer(x, bias=bias, read=read)
        return self.queries(x) if config["queries"] else x, None

    def _of_patches(
        self, patches: UInt8[Array, "batch tokens values"], shape: Int[Array, "batch 2"]
    ) -> tuple[Float[Array, "batch tokens embed"], Bool[Array, "batch tokens"]]:
        config, (batch, count, _) = self.config, patches.shape
        pixels = normalize(patches.reshape(batch, count, -1, 3), config["mean"], config["std"], self.dtype)
        x = self.positions(self.patches(pixels.reshape(patches.shape)), shape)
        x = self.embed_norm(x) if config["embed_norm"] else x
        valid = jnp.arange(count) < shape.prod(axis=1, keepdims=True)
        return self.transformer(x, valid[:, None, None, :]), valid


class TextEncoder(nn.Module):
    """A text Transformer over token ids. Fields: `mmjax.config.text_encoder`.

    A `class_token` stands after the text, the last of the tower's tokens. With `shifted_mask` the mask of padding
    begins with its place instead of ending with it: a token may be attended to if the id before it is no padding.

    With a key for each row (in training), `token_drop` of the tokens are left out, padding first. With `cross` its
    layers attend to a context too, where they are given one.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32
    cross: bool = False

    def setup(self):
        config, width = self.config, tower_size(self.config).width
        style, types = style_of(config), config["token_types"]
        places = positions_of(config) + config["class_token"]
        self.embed = TextEmbed(config["vocab_size"], places, width, self.dtype, style, types)
        if config["class_token"]:
            self.class_token = self.param("class_token", nn.initializers.normal(0.01), (1, width))
        self.transformer = _transformer(config, self.dtype, self.cross)
        self.pool = _pool(config, self.dtype)

    def __call__(
        self,
        text: Int[Array, "batch length"],
        rng: Key[Array, " batch"] | None = None,
        context: Float[Array, "batch keys embed2"] | None = None,
        pooled_only: bool = False,
    ) -> tuple[Float[Array, "batch tokens embed"], Bool[Array, "batch tokens"] | None]:
        """The tokens, and which of them are no padding (None: padding is part of the input). With `pooled_only` there
        is one token, that which is pooled.
        """
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
        if pooled_only:
            read = place(config["pooling"], x.shape[1], x.shape[0], valid)
            return self.transformer(x, mask, read=read), jnp.ones((x.shape[0], 1), bool)
        return self.transformer(x, mask, context), valid

    def _class_tokens(self, batch: int, length: int) -> Float[Array, "batch 1 embed"]:
        token = self.embed.blank(self.class_token, 1, first=length)
        return jnp.broadcast_to(token, (batch, *token.shape[1:]))

    def empty_cache(self, batch: int, length: int) -> PyTree[Array]:
        """What `step` starts from, for texts of this length at most."""
        return self.transformer.empty_cache(batch, length, tower_size(self.config).width)

    def step(
        self, token: Int[Array, " batch"], position: Int[Array, ""], cache: PyTree[Array]
    ) -> tuple[Float[Array, "batch 1 embed"], PyTree[Array]]:
        """The tower's token of one more id, where the tower is causal."""
        mask = (jnp.arange(cache["self"]["key"].shape[2]) <= position)[None, None, None]
        return self.transformer(self.embed(token[:, None], position), mask, None, cache, position)


class AudioEncoder(nn.Module):
    """A Transformer over a recording (Radford et al. 2023, section 2.2). Fields: `mmjax.config.audio_encoder`.

    With a key for each row (in training), `token_drop` of the tokens are left out.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config, width = self.config, tower_size(self.config).width
        signal = (config[name] for name in ("sample_rate", "fft", "hop", "mels"))
        self.embed = AudioEmbed(*signal, audio_tokens(config), width, self.dtype)
        self.transformer = _transformer(config, self.dtype)
        self.pool = _pool(config, self.dtype)

    def __call__(
        self,
        audio: Float[Array, "batch samples"],
        rng: Key[Array, " batch"] | None = None,
        pooled_only: bool = False,
    ) -> tuple[Float[Array, "batch tokens embed"], None]:
        """The tokens, and None: all of them are valid, those of silence at the end too. With `pooled_only` there is one
        token, that which is pooled.
        """
        x = self.embed(audio)
        if rng is not None and self.config["token_drop"]:
            x = drop_tokens(x, rng, self.config["token_drop"])
        read = place(self.config["pooling"], x.shape[1], x.shape[0], None) if pooled_only else None
        return self.transformer(x, read=read), None


ENCODERS = {"image": ImageEncoder, "text": TextEncoder, "audio": AudioEncoder}


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

    Only `parts` are built. `logit_scale` is stored as its logarithm and clamped at `max_logit_scale` (100 in CLIP,
    Radford et al. 2021, section 2.5), if that is not 0.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32
    parts: Collection[str] = ("image", "text")
    parallel: bool = False  # whether the decoder also predicts all tokens at once

    def setup(self):
        encoders = {name: encoder for name, encoder in self.config["encoders"].items() if name in self.parts}
        self.tower_reads = "fusion" in self.parts and self.config["fusion"]["reads"] == "tower"
        own = {"text": {"cross": self.tower_reads}}
        self.towers = {
            name: ENCODERS[name](encoder, self.dtype, name=name, **own.get(name, {}))
            for name, encoder in encoders.items()
        }
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
            self.decoder = Decoder(config, text["vocab_size"], positions_of(text), self.dtype, style)
        if "classifier" in self.parts:
            self.classifier = nn.Dense(len(self.config["classifier"]["labels"]), dtype=jnp.float32)
        if "image_tokens" in self.parts:
            self.image_token_head = TokenHead(self.config["image_tokens"]["vocab_size"], dtype=self.dtype)

    def encode(self, modality: str, inputs: Array, rng: Key[Array, " batch"] | None = None) -> dict[str, Array]:
        """`tokens`, `valid` (of the tokens; None for all), `pooled`, `projected`, and `embedding`.

        `rng` has a key for each row in training; without one nothing is random.
        """
        tokens, valid = self.tokens(modality, inputs, rng)
        return {"tokens": tokens, "valid": valid, **self.embed(modality, tokens, valid)}

    def features(self, modality: str, inputs: Array) -> dict[str, Array]:
        """`embed` of the tokens; where one of them is pooled, the last layer computes no other. For inference."""
        encoder = self.config["encoders"][modality]
        alone = encoder["pooling"] in ONE_TOKEN and not encoder.get("queries") and not encoder.get("max_patches")
        return self.embed(modality, *self.tokens(modality, inputs, pooled_only=alone))

    def tokens(
        self, modality: str, inputs: Array, rng: Key[Array, " batch"] | None = None, **options: Array
    ) -> tuple[Array, Any]:
        """What the tower makes of its input, and which of the tokens are no padding (None: all).

        `options` are those of the tower, such as `masked` of the image's.
        """
        if rng is not None:  # towers draw apart from each other
            rng = jax.vmap(jax.random.fold_in, (0, None))(rng, sorted(self.config["encoders"]).index(modality))
        return self.towers[modality](inputs, rng, **options)

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
        most = self.config["max_logit_scale"]
        scale = jnp.exp(jnp.minimum(self.logit_scale, np.log(most)) if most else self.logit_scale)
        return {"logit_scale": scale, "logit_bias": self.logit_bias}

    def classify(self, image: Float[Array, "batch tokens embed"]) -> Float[Array, "batch classes"]:
        """Logits of an image's classes by its tokens: by what is pooled of them, or by the class token and the mean of
        the others (DINOv2).
        """
        if self.config["classifier"]["reads"] == "pooled":
            return self.classifier(self.towers["image"].pool(image))
        return self.classifier(jnp.concatenate([image[:, 0], image[:, 1:].mean(axis=1)], axis=-1))

    def predict_image_tokens(self, image: Float[Array, "batch tokens embed"]) -> Float[Array, "batch patches vocab"]:
        """Logits of the visual token of each patch, by the image's tokens ("BEiT: BERT Pre-Training of Image
        Transformers", Bao et al. 2022, section 2.4).
        """
        return self.image_token_head(image[:, int(has_class_token(self.config["encoders"]["image"])) :])

    def match(self, text: Text, image: Float[Array, "batch tokens embed"]) -> Float[Array, "batch 2"]:
        """Logits of "does not belong" and "belongs" for pairs of a text and an image's tokens."""
        text = text.without_class_token()
        return self.fusion.match(self._fuse(text, image), text.valid)

    def predict(
        self,
        text: Text,
        image: Float[Array, "batch tokens embed"] | None,
        places: Int[Array, "batch places"] | None = None,
    ) -> Float[Array, "batch places vocab"]:
        """Logits of the token at each place, or at these."""
        fused = self._fuse(text, image)
        if places is not None:
            fused = jnp.take_along_axis(fused, places[..., None], axis=1)
        return self.fusion.predict(fused, self.towers["text"].embed.table())

    def _fuse(self, text: Text, image: Array | None) -> Array:
        if self.tower_reads:
            return self.towers["text"](text.ids, context=image)[0]
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
        self, image: Float[Array, "batch tokens embed"], first: Int[Array, " batch"], length: int = 0
    ) -> tuple[Float[Array, "batch vocab"], PyTree[Array]]:
        """Logits of the first token, or of the second where texts begin with the start token `first`; and the cache,
        for texts of this length at most: see `Decoder.begin`.
        """
        cache = {}
        if self.config["decoder"]["reads"] == "text":
            longest = positions_of(self.config["encoders"]["text"])
            cache["text"] = self.towers["text"].empty_cache(image.shape[0], length or longest)
            if not self.config["decoder"]["start"]:
                first, cache["text"] = self.towers["text"].step(first, jnp.zeros((), jnp.int32), cache["text"])
        logits, cache["decoder"] = self.decoder.begin(image, first, length)
        return logits, cache

    def continue_caption(
        self, ids: Int[Array, " batch"], slot: Int[Array, ""], cache: PyTree[Array], length: int = 0
    ) -> tuple[Float[Array, "batch vocab"], PyTree[Array]]:
        """Logits of the token after `ids`, which stand in this slot (from 1 on: see `Decoder`); and the cache, which
        began with this length.
        """
        token, cache = ids, dict(cache)
        if "text" in cache:
            position = slot - 1 if self.config["decoder"]["start"] else slot
            token, cache["text"] = self.towers["text"].step(ids, position, cache["text"])
        logits, cache["decoder"] = self.decoder.step(token, slot, cache["decoder"], length)
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
            context = out[self.config["decoder"]["modality"]]["tokens"]
            self.caption(text, context, jnp.zeros(len(text.ids), bool) if self.parallel else None)
        if "classifier" in self.parts:
            self.classify(image)
        if "image_tokens" in self.parts:
            self.predict_image_tokens(image)
        return {**out, **self.logits()}
