"""Multi-head attention, self and cross, and the choice of its implementation."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmjax.sharding.rules import constrain


class Attention(nn.Module):
    """Multi-head attention ("Attention Is All You Need", Vaswani et al. 2017, section 3.2).

    With `context`, keys and values come from there (cross-attention); without, from the queries'
    own tokens (self-attention). `mask` is True where a key may be attended to.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        context: Float[Array, "batch keys embed2"] | None = None,
        mask: Bool[Array, "#batch #heads #tokens keys"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        width = x.shape[-1]
        context = x if context is None else context

        def project(name: str, tokens: Array) -> Float[Array, "batch tokens heads head_dim"]:
            init = nn.initializers.xavier_uniform()
            projected = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)(tokens)
            split = projected.reshape(*tokens.shape[:-1], self.heads, width // self.heads)
            return constrain(split, "batch", "sequence", "heads", None)

        query, key, value = project("query", x), project("key", context), project("value", context)
        chosen = implementation(query, key, mask)
        if chosen == "cudnn" and mask is not None:  # it takes no mask that is to be broadcast over the queries
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=chosen)
        merged = constrain(attended.reshape(x.shape), "batch", "sequence", "heads")
        out = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="out")(merged)
        return constrain(out, "batch", "sequence", "embed")


def implementation(query: Array, key: Array, mask: Array | None) -> str:
    """ "cudnn" (flash attention) on a GPU where its conditions hold, "xla" everywhere else.

    cuDNN takes 16-bit types and head sizes that are multiples of 8 up to 256; its backward pass
    with a mask needs even sequence lengths.
    """
    head_dim, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    sixteen_bit = query.dtype in (jnp.bfloat16, jnp.float16)
    even = mask is None or all(length % 2 == 0 for length in lengths)
    if jax.default_backend() == "gpu" and sixteen_bit and head_dim % 8 == 0 and head_dim <= 256 and even:
        return "cudnn"
    return "xla"
