"""BEiT ("BEiT: BERT Pre-Training of Image Transformers", Bao et al. 2022), as `transformers.BeitModel`,
`BeitForImageClassification` and `BeitForMaskedImageModeling` have it.

What the tower pools, and `encode_image` normalises, is the mean of the patches' tokens: of the normalised ones in
BeitForMaskedImageModeling, and normalised after that in the others; without `use_mean_pooling` it is the class token.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop import clip, image_tower, processing, vit
from mmjax.interop.family import Family, Json
from mmjax.interop.image_tower import is_in
from mmjax.interop.table import TOKEN, Row, Table, norm

_DEFAULT = vit.DEFAULT | {
    "vocab_size": 8192,
    "use_mask_token": False,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": True,
    "layer_scale_init_value": 0.1,
}
_IMAGE = {"resize": "squash", "resample": "bicubic", **processing.INCEPTION}
_BIAS = "relative_position_bias.relative_position_bias_table"


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a BEiT.

    Raises:
      UserError: it is no such model, or one with a part that models here have not.
    """
    theirs = _DEFAULT | dict(theirs)
    kind = (theirs.get("architectures") or ["BeitModel"])[0]
    image_tower.check(theirs, num_channels=3)
    if is_in("decode_head.classifier.weight", files, kind == "BeitForSemanticSegmentation"):
        raise UserError("BeitForSemanticSegmentation labels pixels, and no model here does")
    classifies = is_in("classifier.weight", files, kind == "BeitForImageClassification")
    predicts = is_in("lm_head.weight", files, kind == "BeitForMaskedImageModeling")
    if predicts:
        image_tower.check(theirs, use_mean_pooling=True, use_mask_token=True)
    mean, base = theirs["use_mean_pooling"], "beit." if classifies else ""
    encoder = configs.image_encoder(
        **clip.tower(theirs),
        variant=f"B/{image_tower.side(theirs, 'patch_size')}",
        class_token=True,
        mask_token=theirs["use_mask_token"],
        key_bias=False,
        layer_scale=float(max(theirs["layer_scale_init_value"], 0)),
        position="learned" if theirs["use_absolute_position_embeddings"] else "none",
        position_interpolation="bicubic",
        relative_position=_relative_position(theirs),
        final_norm=predicts or not mean,
        pooling="mean" if mean else "cls",
        pool_norm=mean and not predicts and is_in(f"{base}pooler.layernorm.weight", files, True),
        **processing.read(files.get("preprocessor_config.json", {}), image_tower.side(theirs, "image_size"), _IMAGE),
    )
    config = image_tower.to_config(encoder, image_tower.labels_of(theirs) if classifies else ())
    if predicts:
        config.model.image_tokens = configs.image_tokens(vocab_size=theirs["vocab_size"])
        config.model.parts += ("image_tokens",)
    return config


def _relative_position(theirs: Json) -> str:
    layer, shared = theirs["use_relative_position_bias"], theirs["use_shared_relative_position_bias"]
    if layer and shared:
        raise UserError("config.json: relative positions are either those of each layer or shared by all")
    return "layer" if layer else "shared" if shared else ""


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a BEiT."""
    from mmjax.models.variants import parse

    image, head = config.model.encoders.image, _head(config)
    kinds = {"": "BeitModel", "classifier": "BeitForImageClassification", "image_tokens": "BeitForMaskedImageModeling"}
    return {
        "model_type": "beit",
        "architectures": [kinds[head]],
        **clip.tower_settings(image),
        "image_size": image.image_size,
        "patch_size": parse(image.variant)[1],
        "vocab_size": config.model.image_tokens.get("vocab_size", _DEFAULT["vocab_size"]),
        "use_mask_token": image.mask_token,
        "use_absolute_position_embeddings": image.position == "learned",
        "use_relative_position_bias": image.relative_position == "layer",
        "use_shared_relative_position_bias": image.relative_position == "shared",
        "use_mean_pooling": image.pooling == "mean",
        "layer_scale_init_value": image.layer_scale,
        **image_tower.class_settings(config),
    }


def _head(config: ConfigDict) -> str:
    return next((part for part in ("classifier", "image_tokens") if part in config.model.parts), "")


def _blocks(image: ConfigDict, theirs: str) -> Iterator[Row]:
    ours = "image/transformer/blocks"
    yield from vit.blocks(ours, theirs, key_bias=False)
    if image.layer_scale:
        yield Row(f"{ours}/attention_layer_scale", f"{theirs}.lambda_1")
        yield Row(f"{ours}/mlp_layer_scale", f"{theirs}.lambda_2")
    if image.relative_position == "layer":
        yield Row(f"{ours}/relative_position/bias_table", f"{theirs}.attention.attention.{_BIAS}")


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.BeitModel`, or of one of the two models that have a head."""
    image, head = config.model.encoders.image, _head(config)
    base = "beit." if head else ""
    rows = [
        *image_tower.embeddings(image, f"{base}embeddings"),
        *_blocks(image, f"{base}encoder.layer.{{}}"),
        *image_tower.classifier(config),
    ]
    if image.mask_token:
        rows.append(Row("image/mask_token", f"{base}embeddings.mask_token", TOKEN))
    if image.relative_position == "shared":
        rows.append(Row("image/relative_position/bias_table", f"{base}encoder.{_BIAS}"))
    if image.final_norm:
        rows += norm("image/transformer/norm", "layernorm" if head == "image_tokens" else f"{base}layernorm")
    if image.pool_norm:
        rows += norm("image/pool/pool_norm", f"{base}pooler.layernorm")
    if head == "image_tokens":
        rows.append(Row("image_token_head/vocab", "lm_head.weight"))
        rows.append(Row("image_token_head/vocab_bias", "lm_head.bias"))
    return Table(tuple(rows), image_tower.FIXED, (r".*relative_position_index",))


def files(config: ConfigDict) -> dict[str, Json]:
    """The image processor's file."""
    return {"preprocessor_config.json": processing.write(config.model.encoders.image, "BeitImageProcessor")}


FAMILY = Family("beit", to_config, to_theirs, table, files)
