"""The captioner: a causal Transformer that reads an image and predicts the text, at once or token by token."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PyTree

from mmjax.models.pooling import Queries
from mmjax.models.text import TextEmbed, TokenHead
from mmjax.models.transformer import PRE_NORM, Style, Transformer

READS = ("embedding", "text")
IMAGE_INPUTS = ("cross", "prefix")


class Decoder(nn.Module):
    """Predicts each token of a text from the image and the tokens before it. Fields: `mmjax.config.decoder`, resolved.

    `reads` is "embedding": ids through an embedding of its own ("Image Captioners Are Scalable Vision Learners Too",
    Tschannen et al. 2023, Cap), or "text": the causal text tower's tokens (CoCa, Yu et al. 2022, section 3.2). `image`
    is "cross": cross-attention in every layer, or "prefix": the image's tokens stand before the text's in the same
    sequence; without `image_class_token` the first of them is left out. A learned `start` vector stands before the
    first token, unless texts begin with a start token; then `start_id`, where it is an id, is read in its place (BLIP,
    Li et al. 2022, section 3.1).

    A sequence position ("slot") predicts the token after it: slot 0 is `start`, or else the first token.
    """

    config: Mapping[str, Any]
    vocab_size: int
    length: int
    dtype: jnp.dtype = jnp.float32
    style: Style = PRE_NORM

    def setup(self):
        config, width = self.config, self.config["width"]
        if config["reads"] == "embedding":
            self.embed = TextEmbed(self.vocab_size, self.length, width, self.dtype, self.style)
        init = nn.initializers.normal(width**-0.5)
        if config["start"]:
            self.start = self.param("start", init, (1, width))
        if config["parallel"]:
            self.mask_token = self.param("mask_token", init, (1, width))
        if config["image_queries"]:
            heads, norm = config["query_heads"] or config["heads"], config["query_norm"]
            self.image_queries = Queries(config["image_queries"], width, heads, self.dtype, self.style, norm)
        if config["image"] == "prefix":
            self.image_projection = nn.Dense(width, use_bias=False, dtype=self.dtype)
        self.transformer = Transformer(
            config["depth"],
            config["heads"],
            config["mlp_dim"],
            config["remat"],
            config["unroll"],
            self.dtype,
            config["image"] == "cross",
            self.style,
            cross_mlp=config["cross_mlp"],
        )
        self.token_head = TokenHead(self.vocab_size, config["transform"], self.dtype, self.style, config["head_bias"])

    def __call__(
        self,
        text: Int[Array, "batch length"] | Float[Array, "batch length embed"],
        image: Float[Array, "batch tokens embed2"],
        parallel: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch slots vocab"]:
        """Logits, float32: with `start`, slot i predicts token i of the text, without it token i + 1 (one slot less).

        Args:
          text: ids, or with `reads` "text" the tower's tokens of them.
          image: the image tower's tokens.
          parallel: rows that see no text at all: every slot predicts its token from the image alone and the slot's
            place (CapPa, Tschannen et al. 2023, section 3.1).
        """
        tokens = text[:, :-1]
        if self.config["reads"] == "embedding":
            tokens = self.embed(self._started(tokens))
        slots = self._with_start(tokens)
        count = slots.shape[1]
        mask = jnp.tril(jnp.ones((1, 1, count, count), bool))
        if parallel is not None:
            blank = self.embed.blank(self.mask_token, count)
            slots = jnp.where(parallel[:, None, None], blank, slots)
            mask = mask | parallel[:, None, None, None]
        image = self._image(image)
        if self.config["image"] == "cross":
            return self._logits(self.transformer(slots, mask, image))
        first = image.shape[1]  # the image sees itself, the text both
        mask = jnp.broadcast_to(mask, (mask.shape[0], 1, count, count))
        sees_image = jnp.ones((mask.shape[0], 1, count, first), bool)
        above = jnp.broadcast_to(jnp.arange(first + count) < first, (mask.shape[0], 1, first, first + count))
        mask = jnp.concatenate([above, jnp.concatenate([sees_image, mask], axis=3)], axis=2)
        return self._logits(self.transformer(jnp.concatenate([image, slots], axis=1), mask)[:, first:])

    def _started(self, ids: Array) -> Array:
        return ids.at[:, 0].set(self.config["start_id"]) if self.config["start_id"] >= 0 else ids

    def _with_start(self, tokens: Array) -> Array:
        if not self.config["start"]:
            return tokens
        start = jnp.broadcast_to(self.start.astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2]))
        return jnp.concatenate([start, tokens], axis=1)

    def _image(self, image: Array) -> Array:
        image = image if self.config["image_class_token"] else image[:, 1:]
        image = self.image_queries(image) if self.config["image_queries"] else image
        return self.image_projection(image) if self.config["image"] == "prefix" else image

    def _logits(self, x: Array) -> Array:
        return self.token_head(x, self.embed.table() if self.config["tied"] else None)

    def begin(
        self,
        image: Float[Array, "batch tokens embed2"],
        first: Int[Array, " batch"] | Float[Array, "batch 1 embed"],
        length: int = 0,
    ) -> tuple[Float[Array, "batch vocab"], PyTree[Array]]:
        """Slot 0: its logits, and the cache for `step`.

        Args:
          image: the image tower's tokens.
          first: without `start`, the first token of each text: its id, or with `reads` "text" the tower's token.
          length: of the texts, at most; 0 for as many tokens as there are positions.
        """
        image, config = self._image(image), self.config
        prefix = image.shape[1] if config["image"] == "prefix" else 0
        slots = (length or self.length) + 1  # the start and every token
        cache = self.transformer.empty_cache(image.shape[0], prefix + slots, config["width"])
        if config["start"]:
            x = jnp.broadcast_to(self.start.astype(image.dtype), (image.shape[0], 1, config["width"]))
        else:
            x = self.embed(self._started(first[:, None])) if config["reads"] == "embedding" else first
        if prefix:
            x = jnp.concatenate([image, x], axis=1)
        places = jnp.arange(prefix + slots)
        rows = jnp.maximum(jnp.arange(x.shape[1])[:, None], prefix - 1)  # the image sees all of itself
        mask = (places <= rows)[None, None]
        context = image if config["image"] == "cross" else None
        x, cache = self.transformer(x, mask, context, cache, jnp.zeros((), jnp.int32))
        return self._logits(x[:, -1:])[:, 0], cache

    def step(
        self,
        token: Int[Array, " batch"] | Float[Array, "batch 1 embed"],
        slot: Int[Array, ""],
        cache: PyTree[Array],
        length: int = 0,
    ) -> tuple[Float[Array, "batch vocab"], PyTree[Array]]:
        """One more slot, from 1 on: its token's id, or with `reads` "text" the tower's token; `length` as before."""
        total = cache["self"]["key"].shape[2]
        position = slot + total - ((length or self.length) + 1)
        place = slot - 1 if self.config["start"] else slot
        x = self.embed(token[:, None], place) if self.config["reads"] == "embedding" else token
        mask = (jnp.arange(total) <= position)[None, None, None]
        x, cache = self.transformer(x, mask, None, cache, position)
        return self._logits(x)[:, 0], cache
