"""ViT ("An Image is Worth 16x16 Words", Dosovitskiy et al. 2021), as `transformers.ViTModel` and
`ViTForImageClassification` have it.

What the tower pools, and `encode_image` normalises, is the class token after the last normalisation; in a ViTModel with
a pooler, what that makes of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop import clip, image_tower, processing
from mmjax.interop.family import Family, Json
from mmjax.interop.image_tower import is_in
from mmjax.interop.table import TOKEN, Row, Table, dense, norm

DEFAULT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
}
_IMAGE = {"resize": "squash", "resample": "bilinear", **processing.INCEPTION}


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a ViT.

    Raises:
      UserError: it is no such model, or one with a part that models here have not.
    """
    theirs = DEFAULT | dict(theirs)
    kind = (theirs.get("architectures") or ["ViTModel"])[0]
    image_tower.check(theirs, qkv_bias=True, num_channels=3, pooler_act="tanh")
    if theirs.get("pooler_output_size") is not None:
        image_tower.check(theirs, pooler_output_size=theirs["hidden_size"])
    if is_in("decoder.0.weight", files, kind == "ViTForMaskedImageModeling"):
        raise UserError("ViTForMaskedImageModeling predicts pixels, and no model here does")
    classifies = is_in("classifier.weight", files, kind == "ViTForImageClassification")
    encoder = configs.image_encoder(
        **clip.tower(theirs),
        variant=f"B/{image_tower.side(theirs, 'patch_size')}",
        pooling="cls",
        pool_dense=not classifies and is_in("pooler.dense.weight", files, True),
        mask_token=is_in(f"{'vit.' if classifies else ''}embeddings.mask_token", files, False),
        position_interpolation="bicubic",
        **processing.read(files.get("preprocessor_config.json", {}), image_tower.side(theirs, "image_size"), _IMAGE),
    )
    return image_tower.to_config(encoder, image_tower.labels_of(theirs) if classifies else ())


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a ViT."""
    from mmjax.models.variants import parse

    image = config.model.encoders.image
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if "classifier" in config.model.parts else "ViTModel"],
        **clip.tower_settings(image),
        "image_size": image.image_size,
        "patch_size": parse(image.variant)[1],
        "qkv_bias": True,
        **image_tower.class_settings(config),
    }


def blocks(ours: str, theirs: str, key_bias: bool = True) -> Iterator[Row]:
    """The rows of a tower's layers, in ViT's and BEiT's names."""
    yield from image_tower.attention(f"{ours}/attention", f"{theirs}.attention", key_bias)
    yield from norm(f"{ours}/norm1", f"{theirs}.layernorm_before")
    yield from dense(f"{ours}/mlp/up", f"{theirs}.intermediate.dense")
    yield from dense(f"{ours}/mlp/down", f"{theirs}.output.dense")
    yield from norm(f"{ours}/norm2", f"{theirs}.layernorm_after")


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.ViTModel`, or of `ViTForImageClassification`."""
    image = config.model.encoders.image
    base = "vit." if "classifier" in config.model.parts else ""
    rows = [
        *image_tower.embeddings(image, f"{base}embeddings"),
        *([Row("image/mask_token", f"{base}embeddings.mask_token", TOKEN)] if image.mask_token else []),
        *blocks("image/transformer/blocks", f"{base}encoder.layer.{{}}"),
        *norm("image/transformer/norm", f"{base}layernorm"),
        *(dense("image/pool/dense", "pooler.dense") if image.pool_dense else []),
        *image_tower.classifier(config),
    ]
    return Table(tuple(rows), image_tower.FIXED, (r"vit\.pooler\..*",))  # no classifier reads the pooler


def files(config: ConfigDict) -> dict[str, Json]:
    """The image processor's file."""
    return {"preprocessor_config.json": processing.write(config.model.encoders.image, "ViTImageProcessor")}


FAMILY = Family("vit", to_config, to_theirs, table, files)
