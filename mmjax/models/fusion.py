"""Text tokens that have seen the image: what matching and masked language modelling read."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mmjax.models.pooling import Pool
from mmjax.models.text import TokenHead
from mmjax.models.transformer import PRE_NORM, Style, Transformer

# What goes into it: the text tower's tokens, or the embedded ids; or the tower itself reads the image, and its tokens
# are the result.
READS = ("text", "embedding", "tower")


class Fusion(nn.Module):
    """A bidirectional Transformer over text tokens with cross-attention to the image's ("Align before Fuse", Li et al.
    2021, section 3.1). Fields: `mmjax.config.fusion`, widths and heads resolved.

    With `reads` "tower" there are no layers here: those of the text tower attend to the image, where there is one
    ("BLIP", Li et al. 2022, section 3.1: the image-grounded text encoder).

    Its heads say whether image and text belong together (`match`, [batch, 2]: no, yes), and which token stands at each
    place (`predict`); each is built where it is called.
    """

    config: Mapping[str, Any]
    vocab_size: int
    dtype: jnp.dtype = jnp.float32
    style: Style = PRE_NORM

    def setup(self):
        config, heads, mlp_dim = self.config, self.config["heads"], self.config["mlp_dim"]
        self.transformer = Transformer(
            config["depth"], heads, mlp_dim, config["remat"], config["unroll"], self.dtype, True, self.style
        )
        self.pool = Pool(config["pooling"], heads, mlp_dim, self.dtype, self.style)
        self.match_head = nn.Dense(2, dtype=jnp.float32)
        self.token_head = TokenHead(self.vocab_size, True, self.dtype, self.style)

    def __call__(
        self,
        text: Float[Array, "batch tokens embed"],
        valid: Bool[Array, "batch tokens"] | None,
        image: Float[Array, "batch image_tokens embed2"] | None,
    ) -> Float[Array, "batch tokens embed"]:
        """The text's tokens after the fusion; without an image there is only self-attention."""
        mask = None if valid is None else valid[:, None, None, :]
        return self.transformer(text, mask, image)

    def match(
        self, fused: Float[Array, "batch tokens embed"], valid: Bool[Array, "batch tokens"] | None
    ) -> Float[Array, "batch 2"]:
        """Logits of "does not belong" and "belongs"."""
        return self.match_head(self.pool(fused, valid).astype(jnp.float32))

    def predict(
        self, fused: Float[Array, "batch places embed"], table: Float[Array, "vocab embed"]
    ) -> Float[Array, "batch places vocab"]:
        """Logits of the token at each place; `table` holds the text tower's embedding of every id."""
        return self.token_head(fused, table)
