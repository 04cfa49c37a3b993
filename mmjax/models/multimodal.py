"""Towers over a shared embedding space.

An encoder maps one modality's input to `{"tokens", "pooled"}`; the model projects what is pooled
into the shared space and normalises it. A modality is an embedding of its own in `ENCODERS`; the
Transformer behind it is shared code.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, UInt8

from mmjax.models import variants
from mmjax.models.patch import PatchEmbed, normalize
from mmjax.models.pooling import Pool
from mmjax.models.position import ImagePosition
from mmjax.models.text import TextEmbed
from mmjax.models.token_drop import drop_tokens
from mmjax.models.transformer import Transformer
from mmjax.sharding.rules import constrain

MAX_LOGIT_SCALE = 100.0


def tower_size(encoder: Mapping[str, Any]) -> variants.Size:
    """The dimensions of a tower: those of its variant, where the config does not set its own."""
    named = variants.parse(encoder["variant"])[0]
    return variants.Size(*(encoder[name] or getattr(named, name) for name in variants.Size._fields))


class ImageEncoder(nn.Module):
    """A vision Transformer (Dosovitskiy et al. 2021). Fields: `mmjax.config.image_encoder`.

    With a key for each row (in training), `token_drop` of the patches are left out.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "batch height width 3"], rng: Key[Array, " batch"] | None = None
    ) -> dict[str, Array]:
        config, size = self.config, tower_size(self.config)
        patch = variants.parse(config["variant"])[1]
        trained = (config["image_size"] // patch,) * 2
        pixels = normalize(image, config["mean"], config["std"], self.dtype)
        x = PatchEmbed(patch, size.width, self.dtype, name="patches")(pixels)
        grid = (image.shape[1] // patch, image.shape[2] // patch)
        class_token = config["pooling"] == "cls"
        if class_token:
            token = self.param("class_token", nn.initializers.zeros, (1, size.width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, size.width)), x], axis=1)
        x = ImagePosition(config["position"], trained, class_token, name="positions")(x, grid)
        if rng is not None and config["token_drop"]:
            x = drop_tokens(x, rng, config["token_drop"], always_kept=int(class_token))
        x = Transformer(
            size.depth, size.heads, size.mlp_dim, config["remat"], config["unroll"], self.dtype, name="transformer"
        )(x)
        return {"tokens": x, "pooled": Pool(config["pooling"], size.heads, size.mlp_dim, self.dtype, name="pool")(x)}


class TextEncoder(nn.Module):
    """A text Transformer over token ids. Fields: `mmjax.config.text_encoder`."""

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: Int[Array, "batch length"], rng: Key[Array, " batch"] | None = None) -> dict[str, Array]:
        config, size = self.config, tower_size(self.config)
        x = TextEmbed(config["vocab_size"], config["length"], size.width, self.dtype, name="embed")(text)
        valid = text != config["pad_id"] if config["mask_padding"] else None
        mask = None if valid is None else valid[:, None, None, :]
        if config["causal"]:
            causal = nn.make_causal_mask(text, dtype=jnp.bool_)
            mask = causal if mask is None else mask & causal
        x = Transformer(
            size.depth, size.heads, size.mlp_dim, config["remat"], config["unroll"], self.dtype, name="transformer"
        )(x, mask)
        pool = Pool(config["pooling"], size.heads, size.mlp_dim, self.dtype, name="pool")
        return {"tokens": x, "pooled": pool(x, valid)}


ENCODERS = {"image": ImageEncoder, "text": TextEncoder}


class MultimodalModel(nn.Module):
    """The towers of `config.encoders` and what compares their embeddings.

    `logit_scale` is stored as its logarithm and clamped at 100 (CLIP, Radford et al. 2021, section 2.5).
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        encoders = self.config["encoders"]
        self.towers = {
            modality: ENCODERS[modality](encoders[modality], self.dtype, name=modality) for modality in encoders
        }
        self.projections = {
            modality: nn.Dense(
                self.config["embed_dim"], use_bias=False, dtype=self.dtype, name=f"{modality}_projection"
            )
            for modality, encoder in encoders.items()
            if encoder["projection"]
        }
        scale, bias = self.config["logit_scale"], self.config["logit_bias"]
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(scale)), ())
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(bias), ())

    def encode(self, modality: str, inputs: Array, rng: Key[Array, " batch"] | None = None) -> dict[str, Array]:
        """`tokens`, `pooled`, and `embedding`: float32 [batch, embed_dim] of unit norm.

        `rng` has a key for each row in training; without one nothing is random.
        """
        if rng is not None:  # towers draw apart from each other
            rng = jax.vmap(jax.random.fold_in, (0, None))(rng, sorted(self.towers).index(modality))
        out = self.towers[modality](inputs, rng)
        pooled = out["pooled"]
        projected = self.projections[modality](pooled) if modality in self.projections else pooled
        projected = projected.astype(jnp.float32)
        norm = jnp.sqrt(jnp.maximum((projected**2).sum(axis=-1, keepdims=True), 1e-12))
        return {**out, "embedding": constrain(projected / norm, "batch", "embed")}

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        """One dictionary of `encode` for each modality in the batch, `logit_scale` and `logit_bias`.

        In training, `batch["rng"]` holds a key for each row.
        """
        rng = batch.get("rng")
        out: dict[str, Any] = {name: self.encode(name, batch[name], rng) for name in self.towers if name in batch}
        return {**out, **self.logits()}

    def logits(self) -> dict[str, Float[Array, ""]]:
        """`logit_scale` (not its logarithm) and `logit_bias`."""
        scale = jnp.exp(jnp.minimum(self.logit_scale, np.log(MAX_LOGIT_SCALE)))
        return {"logit_scale": scale, "logit_bias": self.logit_bias}
