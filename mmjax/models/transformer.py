"""The pre-norm Transformer: MLP, block, and the scanned stack of blocks."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmjax.models.attention import Attention
from mmjax.sharding.rules import constrain

# What the backward pass finds saved; the rest it computes again.
REMAT_POLICIES = {
    "none": None,  # everything is saved: no rematerialisation
    "dots": jax.checkpoint_policies.dots_saveable,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
LAYER_NORM_EPSILON = 1e-6


def layer_norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
    """The layer normalisation that every part of the model uses."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, name=name)


class Mlp(nn.Module):
    """Two dense layers with a GELU (tanh approximation) between them."""

    mlp_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch tokens embed"]:
        init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(1e-6)}
        hidden = nn.Dense(self.mlp_dim, dtype=self.dtype, name="up", **init)(x)
        hidden = nn.gelu(constrain(hidden, "batch", "sequence", "mlp"))
        out = nn.Dense(x.shape[-1], dtype=self.dtype, name="down", **init)(hidden)
        return constrain(out, "batch", "sequence", "embed")


class Block(nn.Module):
    """One pre-norm block: attention, then the MLP, each added to the residual stream."""

    heads: int
    mlp_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        mask: Bool[Array, "#batch #heads #tokens tokens"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        normed = layer_norm("norm1", self.dtype)(x)
        x = x + Attention(self.heads, self.dtype, name="attention")(normed, mask=mask)
        normed = layer_norm("norm2", self.dtype)(x)
        return x + Mlp(self.mlp_dim, self.dtype, name="mlp")(normed)


class Transformer(nn.Module):
    """A stack of blocks and a final normalisation.

    The blocks' parameters are stacked over a leading layer axis. `unroll` layers are laid out in
    one iteration of the scan (0: all of them); it changes speed and compile time, not parameters.
    """

    depth: int
    heads: int
    mlp_dim: int
    remat: str = "none"
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        mask: Bool[Array, "#batch #heads #tokens tokens"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        stack = nn.scan(
            lambda module, carry, mask: (module(carry, mask), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.unroll or self.depth,
        )
        x = constrain(x, "batch", "sequence", "embed")
        x, _ = stack(block(self.heads, self.mlp_dim, self.dtype, name="blocks"), x, mask)
        return layer_norm("norm", self.dtype)(x)
