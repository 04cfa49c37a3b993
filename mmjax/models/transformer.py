"""The Transformer: MLP, block, and the scanned stack of blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PyTree

from mmjax.models.attention import ATTENTION, SHIFT, Attention
from mmjax.models.dense import product
from mmjax.models.position import Relative, RelativePosition
from mmjax.sharding.rules import constrain

# What the backward pass finds saved; the rest it computes again.
REMAT_POLICIES = {
    "none": None,  # everything is saved: no rematerialisation
    "dots": jax.checkpoint_policies.dots_saveable,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ACTIVATIONS = {
    "gelu_tanh": nn.gelu,
    "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)),  # nn.gelu's erfc takes an exponential more
    "silu": nn.silu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # of CLIP's first models
}
NORMS = ("pre", "post")
# For the backward pass it saves its sums, and computes again the four arrays of its input's size.
_LayerNorm = nn.remat(nn.LayerNorm, policy=lambda primitive, *_, **__: primitive.name in ("reduce_sum", "rsqrt"))


class Style(NamedTuple):
    """What families of Transformers differ in.

    `norm`: "pre" normalises what goes into a layer, and once more at the end (ViT, CLIP); "post" the residual stream
    after each layer (BERT). `epsilon` is that of the normalisations. Without `final_norm` there is none at the end.
    Without `key_bias` keys are projected without one (BEiT, Whisper). A `layer_scale` other than 0 is what a learned
    factor of each layer's outputs starts from ("Going deeper with Image Transformers", Touvron et al. 2021, section 2).
    `gated` is for the MLPs of blocks: see `Mlp`.
    """

    norm: str = "pre"
    epsilon: float = 1e-6
    activation: str = "gelu_tanh"
    final_norm: bool = True
    key_bias: bool = True
    layer_scale: float = 0.0
    gated: bool = False


PRE_NORM = Style()


def layer_norm(name: str, dtype: jnp.dtype, style: Style = PRE_NORM) -> nn.LayerNorm:
    """The layer normalisation that every part of the model uses."""
    return _LayerNorm(epsilon=style.epsilon, dtype=dtype, name=name)


class Mlp(nn.Module):
    """Two dense layers with an activation between them.

    With `gated`, what is activated is a third layer's output, and the first one's is multiplied by it ("GLU Variants
    Improve Transformer", Shazeer 2020, section 2; with silu: SwiGLU).
    """

    mlp_dim: int
    dtype: jnp.dtype = jnp.float32
    activation: str = "gelu_tanh"
    gated: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch tokens embed"]:
        init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(1e-6)}
        options = {"dtype": self.dtype, "dot_general": product, **init}

        def widened(name: str) -> Float[Array, "batch tokens mlp"]:
            hidden = nn.Dense(self.mlp_dim, name=name, **options)(x)
            return constrain(hidden, "batch", "sequence", "mlp")

        # The backward pass computes it again: what it would save instead is several times its input.
        activate, hidden = jax.checkpoint(ACTIVATIONS[self.activation]), widened("up")
        hidden = activate(widened("gate")) * hidden if self.gated else activate(hidden)
        out = nn.Dense(x.shape[-1], name="down", **options)(hidden)
        return constrain(out, "batch", "sequence", "embed")


class Block(nn.Module):
    """One block: self-attention, where `cross` is set attention to a context, then the MLP, each added to its input.

    With `cross_mlp` the attention to the context comes after the MLP, its context is normalised, and an MLP of its own
    follows it: the layers of open_clip's CoCa.

    `cache` holds the keys and values of both attentions, `self` and `cross`; those of the context are computed once,
    where they are missing. Returns the tokens and the cache.

    `bias` is added to the logits of self-attention; with `relative`, so is one of this block's own.

    With `read`, a place for each row, the token there is all that is computed from the tokens, and returned.
    """

    heads: int
    mlp_dim: int
    dtype: jnp.dtype = jnp.float32
    cross: bool = False
    style: Style = PRE_NORM
    relative: Relative | None = None
    cross_mlp: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        cache: PyTree[Array] | None = None,
        mask: Bool[Array, "#batch #heads #tokens keys"] | None = None,
        context: Float[Array, "batch keys2 embed2"] | None = None,
        position: Int[Array, ""] | None = None,
        bias: Float[Array, "1 heads tokens tokens"] | None = None,
        read: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], PyTree[Array] | None]:
        if self.relative is not None:
            own = RelativePosition(self.relative, self.heads, name="relative_position")()
            bias = own if bias is None else bias + own
        kept: dict[str, Any] = {}

        def attend(name: str, tokens: Array) -> Array:
            attention = Attention(self.heads, self.dtype, self.style.key_bias, name=name)
            if read is not None:
                queries = _tokens_at(read, tokens)
                return attention(queries, tokens, _queries_at(read, mask), bias=_queries_at(read, bias))
            if cache is None:
                return attention(tokens, mask=mask, bias=bias)
            out, kept["self"] = attention(tokens, mask=mask, cache=cache["self"], position=position)
            return out

        def attend_to_context(name: str, tokens: Array) -> Array:
            attention = Attention(self.heads, self.dtype, self.style.key_bias, name=name)
            read = context
            if self.cross_mlp and context is not None:
                read = layer_norm("norm_context", self.dtype, self.style)(context)
            if cache is None:
                return attention(tokens, context=read)
            out, kept["cross"] = attention(tokens, context=read, cache=cache.get("cross", {}))
            return out

        def process(name: str, tokens: Array) -> Array:
            return Mlp(self.mlp_dim, self.dtype, self.style.activation, self.style.gated, name=name)(tokens)

        layers = [("norm1", "attention", attend), ("norm2", "mlp", process)]
        if self.cross and (context is not None or (cache is not None and "cross" in cache)):
            layers.insert(2 if self.cross_mlp else 1, ("norm_cross", "cross_attention", attend_to_context))
            if self.cross_mlp:
                layers.append(("norm_cross_mlp", "cross_mlp", process))
        for norm_name, name, layer in layers:
            norm = layer_norm(norm_name, self.dtype, self.style)
            pre = self.style.norm == "pre"
            out = layer(name, norm(x) if pre else x)
            if self.style.layer_scale:
                init = nn.initializers.constant(self.style.layer_scale)
                out = out * self.param(f"{name}_layer_scale", init, out.shape[-1:]).astype(out.dtype)
            if read is not None and layer is attend:
                x = _tokens_at(read, x)
            x = x + out if pre else norm(x + out)
        return x, None if cache is None else kept


def _tokens_at(read: Int[Array, " batch"], x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch 1 embed"]:
    return jnp.take_along_axis(x, read[:, None, None], axis=1)


def _queries_at(read: Int[Array, " batch"], pairs: Array | None) -> Array | None:
    """Of a mask or a bias [#batch, heads, #tokens, keys] what belongs to the queries at these places."""
    if pairs is None or pairs.shape[2] == 1:
        return pairs
    if pairs.shape[0] == 1:
        return pairs[0][:, read].swapaxes(0, 1)[:, :, None]
    return jnp.take_along_axis(pairs, read[:, None, None, None], axis=2)


class Transformer(nn.Module):
    """A stack of blocks and, with `style.norm` "pre" and `style.final_norm`, a final normalisation.

    The blocks' parameters are stacked over a leading layer axis, and so is a `cache`. `unroll` layers are laid out in
    one iteration of the scan (0: all of them); it changes speed and compile time, not parameters. All blocks add the
    same `bias`, and with `relative` one of their own.

    With `read`, a place for each row, only the token there is returned: [batch, 1, embed]. The last layer computes
    nothing else, which saves most of its work. It is for inference: there is no gradient with respect to parameters.
    """

    depth: int
    heads: int
    mlp_dim: int
    remat: str = "none"
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    cross: bool = False
    style: Style = PRE_NORM
    relative: Relative | None = None
    cross_mlp: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        mask: Bool[Array, "#batch #heads #tokens keys"] | None = None,
        context: Float[Array, "batch keys2 embed2"] | None = None,
        cache: PyTree[Array] | None = None,
        position: Int[Array, ""] | None = None,
        bias: Float[Array, "1 heads tokens tokens"] | None = None,
        read: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch tokens embed"] | tuple[Float[Array, "batch tokens embed"], PyTree[Array]]:
        x, kept = constrain(x, "batch", "sequence", "embed"), cache
        block_style = (self.cross, self.style, self.relative, self.cross_mlp)
        if self.depth and read is not None:
            x = self._read(Block(self.heads, self.mlp_dim, self.dtype, *block_style, parent=None), x, mask, bias, read)
        elif self.depth:
            block = Block
            if self.remat != "none":
                block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            stack = nn.scan(
                lambda module, carry, cache, *shared: module(carry, cache, *shared),
                variable_axes={"params": 0, ATTENTION: 0, SHIFT: 0},
                split_rngs={"params": True},
                in_axes=(0, *[nn.broadcast] * 4),
                length=self.depth,
                unroll=1 if self.is_initializing() else self.unroll or self.depth,
                # The check traces the block once more; where parameters are drawn, which ones depends on it.
                check_constancy_invariants=self.is_initializing(),
            )
            blocks = block(self.heads, self.mlp_dim, self.dtype, *block_style, name="blocks")
            x, kept = stack(blocks, x, cache, mask, context, position, bias)
        if self.style.norm == "pre" and self.style.final_norm:
            x = layer_norm("norm", self.dtype, self.style)(x)
        return x if cache is None else (x, kept)

    def _read(self, block: Block, x: Array, mask: Array | None, bias: Array | None, read: Array) -> Array:
        stacked = self.variables["params"]["blocks"]

        def layer(number: Array | int, x: Array, read: Array | None = None) -> Array:
            # Indexed here, not sliced before: a slice of all layers but one would be a copy of their parameters.
            params = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, number, keepdims=False), stacked)
            return block.apply({"params": params}, x, None, mask, None, None, bias, read)[0]

        return layer(self.depth - 1, jax.lax.fori_loop(0, self.depth - 1, layer, x), read)

    def empty_cache(self, batch: int, tokens: int, width: int) -> PyTree[Array]:
        """A cache for so many tokens, with nothing in it."""
        shape = (self.depth, batch, tokens, self.heads, width // self.heads)
        return {"self": {name: jnp.zeros(shape, self.dtype) for name in ("key", "value")}}
