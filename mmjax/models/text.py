"""Token ids to text tokens."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int


class TextEmbed(nn.Module):
    """Token embedding plus a learned position embedding."""

    vocab_size: int
    length: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens embed"]:
        init = nn.initializers.normal(self.width**-0.5)
        tokens = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=init, name="token_embed")(ids)
        position = self.param("position", nn.initializers.normal(0.01), (self.length, self.width))
        return tokens + position[: ids.shape[1]].astype(self.dtype)
