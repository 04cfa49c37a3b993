"""DINOv2 ("DINOv2: Learning Robust Visual Features without Supervision", Oquab et al. 2023), as
`transformers.Dinov2Model` and `Dinov2ForImageClassification` have it.

What the tower pools, and `encode_image` normalises, is the class token after the last normalisation. Positions are
learned for images of one size (518 pixels in the published models) and interpolated to the size that is read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop import clip, image_tower, processing, vit
from mmjax.interop.family import Family, Json
from mmjax.interop.image_tower import is_in
from mmjax.interop.table import TRANSPOSED, Row, Table, dense, norm

_DEFAULT = {key: value for key, value in vit.DEFAULT.items() if key != "intermediate_size"} | {
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "mlp_ratio": 4,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
}
_IMAGE = {"resize": "center_crop", "resample": "bicubic", **processing.IMAGENET}
# How images are read where no file says it, as by the published models.
_PROCESSOR = {"size": {"shortest_edge": 256}, "crop_size": 224}


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a DINOv2.

    Raises:
      UserError: it is no such model, or one with a part that models here have not.
    """
    theirs = _DEFAULT | dict(theirs)
    kind = (theirs.get("architectures") or ["Dinov2Model"])[0]
    image_tower.check(theirs, qkv_bias=True, num_channels=3)
    classifies = is_in("classifier.weight", files, kind == "Dinov2ForImageClassification")
    mlp_dim = _mlp_dim(theirs["hidden_size"], theirs["mlp_ratio"], theirs["use_swiglu_ffn"])
    made_for = image_tower.side(theirs, "image_size")
    reads = processing.read(files.get("preprocessor_config.json") or _PROCESSOR, 224, _IMAGE, any_size=True)
    settings = clip.tower(theirs | {"intermediate_size": mlp_dim})
    encoder = configs.image_encoder(
        **settings | ({"activation": "silu", "gated": True} if theirs["use_swiglu_ffn"] else {}),
        variant=f"B/{image_tower.side(theirs, 'patch_size')}",
        pooling="cls",
        mask_token=theirs["use_mask_token"],
        layer_scale=float(theirs["layerscale_value"] or 1.0),
        position_size=0 if made_for == reads["image_size"] else made_for,
        position_interpolation="bicubic",
        **reads,
    )
    return image_tower.to_config(encoder, image_tower.labels_of(theirs) if classifies else (), "class_and_mean")


def _mlp_dim(width: int, ratio: float, gated: bool) -> int:
    """The width of an MLP's hidden layer; of a gated one two thirds, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (hidden * 2 // 3 + 7) // 8 * 8 if gated else hidden


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a DINOv2.

    Raises:
      UserError: the MLPs are of another width.
    """
    from mmjax.models.variants import parse

    image = config.model.encoders.image
    named = image.to_dict() | ({"activation": "gelu"} if image.gated else {})
    settings = clip.tower_settings(named)
    width, mlp_dim = settings["hidden_size"], settings.pop("intermediate_size")
    ratio = next((ratio for ratio in range(1, 17) if _mlp_dim(width, ratio, image.gated) == mlp_dim), None)
    if ratio is None:
        raise UserError(f"this is no model of the family dinov2: its MLPs are {mlp_dim} wide, for a width of {width}")
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2ForImageClassification" if "classifier" in config.model.parts else "Dinov2Model"],
        **settings,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": image.gated,
        "use_mask_token": image.mask_token,
        "layerscale_value": image.layer_scale,
        "image_size": image.position_size or image.image_size,
        "patch_size": parse(image.variant)[1],
        "qkv_bias": True,
        **image_tower.class_settings(config),
    }


def _blocks(ours: str, theirs: str, gated: bool) -> Iterator[Row]:
    yield from image_tower.attention(f"{ours}/attention", f"{theirs}.attention")
    yield from norm(f"{ours}/norm1", f"{theirs}.norm1")
    yield from norm(f"{ours}/norm2", f"{theirs}.norm2")
    yield Row(f"{ours}/attention_layer_scale", f"{theirs}.layer_scale1.lambda1")
    yield Row(f"{ours}/mlp_layer_scale", f"{theirs}.layer_scale2.lambda1")
    if gated:
        for index, name in enumerate(("gate", "up")):
            yield Row(f"{ours}/mlp/{name}/kernel", f"{theirs}.mlp.weights_in.weight", TRANSPOSED, (index, 2))
            yield Row(f"{ours}/mlp/{name}/bias", f"{theirs}.mlp.weights_in.bias", part=(index, 2))
        yield from dense(f"{ours}/mlp/down", f"{theirs}.mlp.weights_out")
    else:
        yield from dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
        yield from dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.Dinov2Model`, or of `Dinov2ForImageClassification`."""
    image = config.model.encoders.image
    base = "dinov2." if "classifier" in config.model.parts else ""
    rows = [
        *image_tower.embeddings(image, f"{base}embeddings"),
        *([Row("image/mask_token", f"{base}embeddings.mask_token")] if image.mask_token else []),
        *_blocks("image/transformer/blocks", f"{base}encoder.layer.{{}}", image.gated),
        *norm("image/transformer/norm", f"{base}layernorm"),
        *image_tower.classifier(config),
    ]
    return Table(tuple(rows), image_tower.FIXED)


def files(config: ConfigDict) -> dict[str, Json]:
    """The image processor's file."""
    return {"preprocessor_config.json": processing.write(config.model.encoders.image, "BitImageProcessor")}


FAMILY = Family("dinov2", to_config, to_theirs, table, files)
