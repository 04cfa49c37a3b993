"""Token sequences to one vector."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from mmjax.models.attention import Attention, explained, is_explained
from mmjax.models.transformer import PRE_NORM, Mlp, Style, layer_norm

POOLINGS = ("mean", "cls", "map", "query", "last", "eos")
ONE_TOKEN = ("cls", "last", "eos")  # those that read one of the tokens
QUERY_NORMS = ("output", "input", "both")


class Queries(nn.Module):
    """Pools tokens into a fixed number, by attention of as many learned queries (CoCa, Yu et al. 2022, section 3.2).

    `norm` says what is normalised: "output", what the attention returns; "input", the queries and what they read;
    "both". open_clip's models have the latter two.
    """

    count: int
    width: int
    heads: int
    dtype: jnp.dtype = jnp.float32
    style: Style = PRE_NORM
    norm: str = "output"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens embed"], valid: Bool[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch queries embed2"]:
        probe = self.param("probe", nn.initializers.normal(self.width**-0.5), (self.count, self.width))
        queries = probe.astype(self.dtype)
        if self.norm != "output":
            queries = layer_norm("query_norm", self.dtype, self.style)(queries)
            x = layer_norm("input_norm", self.dtype, self.style)(x)
        queries = jnp.broadcast_to(queries, (x.shape[0], *probe.shape))
        mask = None if valid is None else valid[:, None, None, :]
        pooled = Attention(self.heads, self.dtype, name="attention")(queries, context=x, mask=mask)
        return pooled if self.norm == "input" else layer_norm("norm", self.dtype, self.style)(pooled)


def place(kind: str, tokens: int, batch: int, valid: Bool[Array, "batch tokens"] | None) -> Int[Array, " batch"]:
    """Where the token is that a pooling of ONE_TOKEN reads: see `Pool`."""
    if kind == "eos":
        return valid.sum(axis=1) - 1
    return jnp.full((batch,), tokens - 1 if kind == "last" else 0)


class Pool(nn.Module):
    """Pools tokens by name.

    - mean: the average of the tokens that `valid` marks;
    - cls: the first token;
    - last: the last position (padding is part of the input there, as in SigLIP's text tower);
    - eos: the last token that `valid` marks, which is the end of the text (CLIP, Radford et al. 2021, section 2.4);
    - map: attention pooling with one learned query ("Scaling Vision Transformers", Zhai et al. 2022);
    - query: the same without its MLP, as `Queries` with `query_norm` (CoCa).

    `heads` are the attention's. With `class_token` the mean leaves the first token out. `norm` normalises what is
    pooled (BEiT), and `dense` is a layer with a hyperbolic tangent after that (BERT's "pooler").
    """

    kind: str
    heads: int
    mlp_dim: int
    dtype: jnp.dtype = jnp.float32
    style: Style = PRE_NORM
    class_token: bool = False
    norm: bool = False
    dense: bool = False
    query_norm: str = "output"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        valid: Bool[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch embed"]:
        pooled = self._pooled(x, valid)
        if self.norm:
            pooled = layer_norm("pool_norm", self.dtype, self.style)(pooled)
        return nn.tanh(nn.Dense(x.shape[-1], dtype=self.dtype, name="dense")(pooled)) if self.dense else pooled

    def _pooled(self, x: Array, valid: Array | None) -> Array:
        if self.kind == "cls":
            return x[:, 0]
        if self.kind == "last":
            return x[:, -1]
        if self.kind == "eos":
            return jnp.take_along_axis(x, place("eos", x.shape[1], x.shape[0], valid)[:, None, None], axis=1)[:, 0]
        if self.kind == "mean" and is_explained(self):
            counted = jnp.ones(x.shape[:2], x.dtype) if valid is None else valid.astype(x.dtype)
            counted = counted.at[:, 0].set(0) if self.class_token else counted
            weights = counted / jnp.maximum(counted.sum(axis=1, keepdims=True), 1)
            return jnp.einsum("bk,bkd->bd", explained(self, weights[:, None, None])[:, 0, 0], x)
        if self.kind == "mean":
            x = x[:, 1:] if self.class_token else x
            if valid is None:
                return x.mean(axis=1)
            weights = valid.astype(x.dtype)[..., None]
            return (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
        batch, _, width = x.shape
        if self.kind == "query":
            queries = Queries(1, width, self.heads, self.dtype, self.style, self.query_norm, name="queries")
            return queries(x, valid)[:, 0]
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, width)).astype(x.dtype)
        query = jnp.broadcast_to(probe, (batch, 1, width))
        mask = None if valid is None else valid[:, None, None, :]
        pooled = Attention(self.heads, self.dtype, name="attention")(query, context=x, mask=mask)
        pooled = pooled + Mlp(self.mlp_dim, self.dtype, self.style.activation, name="mlp")(
            layer_norm("norm", self.dtype, self.style)(pooled)
        )
        return pooled[:, 0]
