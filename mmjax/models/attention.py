"""Multi-head attention, self and cross, and the choice of its implementation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mmjax.models.dense import product
from mmjax.sharding.rules import constrain

# `key` and `value`: [batch, tokens, heads, head_dim], of all tokens that a query may see.
Cache = Mapping[str, Array]
# Collections of Flax variables, for `mmjax.explain` alone.
ATTENTION, SHIFT = "attention", "attention_shift"
FEW_KEYS = 32  # fewer: XLA's own order is as fast on a CPU
_portable: ContextVar[bool] = ContextVar("portable", default=False)


class Attention(nn.Module):
    """Multi-head attention ("Attention Is All You Need", Vaswani et al. 2017, section 3.2).

    With `context`, keys and values come from there (cross-attention); without, from the queries'
    own tokens (self-attention). `mask` is True where a key may be attended to; `bias` is added to the logits.

    With a `cache`, the keys and values of `x` are written into it at `position`, and all of it is attended to where
    `mask` allows; without a position, they are taken from it as they are. Then the cache is returned too.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32
    key_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        context: Float[Array, "batch keys embed2"] | None = None,
        mask: Bool[Array, "#batch #heads #tokens keys"] | None = None,
        cache: Cache | None = None,
        position: Int[Array, ""] | None = None,
        bias: Float[Array, "1 heads tokens keys"] | None = None,
    ) -> Float[Array, "batch tokens embed"] | tuple[Float[Array, "batch tokens embed"], Cache]:
        width = x.shape[-1]
        options = {"dtype": self.dtype, "kernel_init": nn.initializers.xavier_uniform(), "dot_general": product}

        def project(name: str, tokens: Array) -> Float[Array, "batch tokens heads head_dim"]:
            projected = nn.Dense(width, self.key_bias or name != "key", name=name, **options)(tokens)
            split = projected.reshape(*tokens.shape[:-1], self.heads, width // self.heads)
            return constrain(split, "batch", "sequence", "heads", None)

        query = project("query", x)
        if cache and position is None:
            key, value = cache["key"], cache["value"]
        else:
            source = x if context is None else context
            key, value = project("key", source), project("value", source)
        if cache and position is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache["key"], key, position, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache["value"], value, position, axis=1)
        chosen = implementation(query, key, mask, bias)
        if is_explained(self) or chosen == "heads_first":
            # A batched product whose batches lie apart in memory is slow on a CPU: heads go before tokens.
            queries, keys, values = (tensor.swapaxes(1, 2) for tensor in (query, key, value))
            logits = _logits(queries, keys, mask, bias)
            if is_explained(self):
                weights = explained(self, nn.softmax(logits).astype(self.dtype))
                attended = jnp.einsum("bhqk,bhkd->bhqd", weights, values)
            else:
                # A softmax whose sum divides the result: one array less of [queries, keys] to save, and one pass.
                weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
                attended = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(self.dtype), values)
                attended = (attended / weights.sum(axis=-1, keepdims=True)).astype(self.dtype)
            attended = attended.swapaxes(1, 2)
        else:
            if chosen == "cudnn" and mask is not None:  # it takes no mask that is to be broadcast over the queries
                mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
            attended = jax.nn.dot_product_attention(query, key, value, bias, mask=mask, implementation=chosen)
        merged = constrain(attended.reshape(x.shape), "batch", "sequence", "heads")
        out = nn.Dense(width, name="out", **options)(merged)
        out = constrain(out, "batch", "sequence", "embed")
        return out if cache is None else (out, {"key": key, "value": value})


def _logits(
    query: Array, key: Array, mask: Array | None, bias: Array | None
) -> Float[Array, "batch heads queries keys"]:
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)


def is_explained(module: nn.Module) -> bool:
    """Whether the caller asks for a module's attention weights: by `mutable=[ATTENTION]` or by giving SHIFT."""
    asked = module.is_mutable_collection(ATTENTION) or module.has_variable(SHIFT, "weights")
    return asked and not module.is_initializing()


def explained(
    module: nn.Module, weights: Float[Array, "batch heads queries keys"]
) -> Float[Array, "batch heads queries keys"]:
    """The same weights, which the caller finds in ATTENTION. What it gives in SHIFT is added to them: a place to take
    gradients with respect to them.
    """
    if module.is_mutable_collection(ATTENTION):
        module.put_variable(ATTENTION, "weights", weights)
    if module.has_variable(SHIFT, "weights"):
        weights = weights + module.get_variable(SHIFT, "weights").astype(weights.dtype)
    return weights


def implementation(query: Array, key: Array, mask: Array | None, bias: Array | None = None) -> str:
    """ "cudnn" (flash attention) on a GPU where its conditions hold, "heads_first" on a CPU, but for few keys
    (docs/performance.md); "xla" everywhere else, and where `portable`.

    cuDNN takes 16-bit types and head sizes that are multiples of 8 up to 256; its backward pass
    with a mask needs even sequence lengths. With a bias it needs them too, and they are odd where there is a class
    token; its gradient would also be rounded to 16 bits. So what has a bias goes to XLA.
    """
    if _portable.get():
        return "xla"
    if jax.default_backend() == "cpu":
        return "heads_first" if key.shape[1] >= FEW_KEYS else "xla"
    head_dim, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    sixteen_bit = query.dtype in (jnp.bfloat16, jnp.float16)
    even = mask is None or all(length % 2 == 0 for length in lengths)
    fits = sixteen_bit and head_dim % 8 == 0 and head_dim <= 256 and even and bias is None
    return "cudnn" if jax.default_backend() == "gpu" and fits else "xla"


@contextmanager
def portable() -> Iterator[None]:
    """What is traced within compiles for every platform, and not only for the one that this process computes on."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)
