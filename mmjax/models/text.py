"""Token ids to text tokens, and tokens to a distribution over ids."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mmjax.models.quantized import QuantizedArray
from mmjax.models.transformer import ACTIVATIONS, PRE_NORM, Style, layer_norm
from mmjax.sharding.rules import constrain


class TextEmbed(nn.Module):
    """Token embedding plus a learned position embedding; with a post-norm Transformer they are normalised (BERT).

    Of several `types` of tokens (BERT's "segments", Devlin et al. 2019, section 3) all are of the first.
    """

    vocab_size: int
    length: int
    width: int
    dtype: jnp.dtype = jnp.float32
    style: Style = PRE_NORM
    types: int = 0

    def setup(self):
        init = nn.initializers.normal(self.width**-0.5)
        self.token_embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=init)
        self.position = self.param("position", nn.initializers.normal(0.01), (self.length, self.width))
        if self.types:
            self.token_type = self.param("token_type", nn.initializers.normal(0.01), (self.types, self.width))
        if self.style.norm == "post":
            self.norm = layer_norm(None, self.dtype, self.style)

    def __call__(
        self, ids: Int[Array, "batch tokens"], first: Int[Array, ""] | int = 0
    ) -> Float[Array, "batch tokens embed"]:
        """`first` is the position of the first of these tokens."""
        # Rows are taken before they are converted: the table itself stays as it is stored.
        tokens = self.table().take(ids, axis=0).astype(self.dtype)
        return self._finish(tokens + self._positions(first, ids.shape[1]))

    def blank(self, token: Float[Array, "1 embed"], length: int, first: int = 0) -> Float[Array, "1 tokens embed"]:
        """A sequence of one vector in place of all ids; `first` as above."""
        return self._finish((token.astype(self.dtype) + self._positions(first, length))[None])

    def table(self) -> Float[Array, "vocab embed"] | QuantizedArray:
        """The embedding of every id."""
        return self.token_embed.embedding

    def _positions(self, first: Int[Array, ""] | int, count: int) -> Float[Array, "tokens embed"]:
        places = jnp.arange(count) + first
        return self.position.take(places, axis=0, mode="clip").astype(self.dtype)

    def _finish(self, x: Array) -> Array:
        x = x + self.token_type[0].astype(x.dtype) if self.types else x
        return self.norm(x) if self.style.norm == "post" else x


class TokenHead(nn.Module):
    """Tokens to logits over the vocabulary, float32: with a table its product (tied weights), else a layer of its own.

    `transform` puts a dense layer, an activation and a normalisation before it (BERT, Devlin et al. 2019). Without
    `use_bias` nothing is added to the product.
    """

    vocab_size: int
    transform: bool = False
    dtype: jnp.dtype = jnp.float32
    style: Style = PRE_NORM
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens embed"], table: Float[Array, "vocab embed"] | QuantizedArray | None = None
    ) -> Float[Array, "batch tokens vocab"]:
        if self.transform:
            x = ACTIVATIONS[self.style.activation](nn.Dense(x.shape[-1], dtype=self.dtype, name="transform")(x))
            x = layer_norm("norm", self.dtype, self.style)(x)
        if table is None:
            init = nn.initializers.normal(x.shape[-1] ** -0.5)
            table = self.param("vocab", init, (self.vocab_size, x.shape[-1]))
        logits = jnp.einsum("btd,vd->btv", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
        if self.use_bias:
            logits = logits + self.param("vocab_bias", nn.initializers.zeros, (self.vocab_size,))
        return constrain(logits, "batch", "sequence", "vocab")
