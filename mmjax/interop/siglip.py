"""SigLIP ("Sigmoid Loss for Language Image Pre-Training", Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025), as
`transformers.SiglipModel` and `Siglip2Model` have them.

SigLIP 2's models for one resolution are SigLIP models to transformers, with Gemma's tokenizer. Those for any shape of
image (NaFlex: section 2.4.2 of the second paper) are a family of their own, `siglip2`: their patches are cut out by
the processor, and so are projected by a linear layer in place of a convolution.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop import processing
from mmjax.interop.clip import blocks, tower, tower_settings
from mmjax.interop.family import Family, Json
from mmjax.interop.table import PATCHES, SCALAR, TOKEN, TRANSPOSED, Row, Table, dense, fused, norm
from mmjax.models.variants import parse

_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_TEXT = _TOWER | {"vocab_size": 32_000, "max_position_embeddings": 64, "projection_size": None}
_VISION = _TOWER | {"image_size": 224, "patch_size": 16, "num_patches": 256, "vision_use_head": True}
_IMAGE = {"resize": "squash", "resample": "bicubic", **processing.INCEPTION}
_NAFLEX_IMAGE = _IMAGE | {"resample": "bilinear"}
_MODEL = ConfigDict({"logit_scale": 10.0, "logit_bias": -10.0, "max_logit_scale": 0.0})


def _to_config(theirs: Json) -> tuple[ConfigDict, dict[str, Any]]:
    """Our config but for how images are read, and the settings of the vision tower there."""
    text, vision = _TEXT | theirs.get("text_config", {}), _VISION | theirs.get("vision_config", {})
    width = text["projection_size"] or text["hidden_size"]
    if vision["hidden_size"] != width:
        raise UserError(f"config.json: images are embedded in {vision['hidden_size']} dimensions, texts in {width}")
    if not vision["vision_use_head"]:
        raise UserError("config.json: vision_use_head is off, so nothing pools an image")
    config = configs.default()
    config.model.update(_MODEL)
    config.model.embed_dim = width
    config.model.encoders.image = configs.image_encoder(
        **tower(vision), variant=f"B/{vision['patch_size']}", pooling="map", projection=False
    )
    config.model.encoders.text = configs.text_encoder(
        **tower(text),
        vocab_size=text["vocab_size"],
        length=text["max_position_embeddings"],
        pooling="last",
        projection_bias=True,
    )
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    return config, vision


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a SigLIP model."""
    config, vision = _to_config(theirs)
    processor = files.get("preprocessor_config.json", {})
    config.model.encoders.image.update(processing.read(processor, vision["image_size"], _IMAGE))
    return config


def naflex_to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a SigLIP 2 model for images of any shape."""
    config, vision = _to_config(theirs)
    processor, patch = files.get("preprocessor_config.json", {}), vision["patch_size"]
    if (processor.get("patch_size") or patch) != patch:
        raise UserError(f"preprocessor_config.json: patches of {processor['patch_size']} pixels for a model of {patch}")
    side = round(vision["num_patches"] ** 0.5)
    if side**2 != vision["num_patches"]:
        raise UserError(f"config.json: num_patches {vision['num_patches']} is no square, and positions lie in one")
    own = {key: value for key, value in processor.items() if key != "size"}  # which would be of one resolution
    image = config.model.encoders.image
    image.update(processing.read(own, side * patch, _NAFLEX_IMAGE))
    image.max_patches = processor.get("max_num_patches") or 256
    return config


def _to_theirs(config: ConfigDict, kind: str, name: str, vision: Mapping[str, int]) -> dict[str, Any]:
    from mmjax.models.multimodal import positions_of

    image, text = config.model.encoders.image, config.model.encoders.text
    return {
        "model_type": kind,
        "architectures": [f"{name}Model"],
        "vision_config": tower_settings(image)
        | {"model_type": f"{kind}_vision_model", "patch_size": parse(image.variant)[1], "vision_use_head": True}
        | vision,
        "text_config": tower_settings(text)
        | {
            "model_type": f"{kind}_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": positions_of(text),
            "projection_size": config.model.embed_dim,
        },
    }


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a SigLIP model."""
    return _to_theirs(config, "siglip", "Siglip", {"image_size": config.model.encoders.image.image_size})


def naflex_to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a SigLIP 2 model for images of any shape."""
    image = config.model.encoders.image
    return _to_theirs(config, "siglip2", "Siglip2", {"num_patches": (image.image_size // parse(image.variant)[1]) ** 2})


def _rows() -> Iterator[Row]:
    """The rows but for the patch embedding's kernel."""
    image, text = "vision_model", "text_model"
    yield Row("logit_scale", "logit_scale", SCALAR)
    yield Row("logit_bias", "logit_bias", SCALAR)
    yield Row("image/patches/patch_embed/bias", f"{image}.embeddings.patch_embedding.bias")
    yield Row("image/positions/position", f"{image}.embeddings.position_embedding.weight")
    yield from blocks("image/transformer/blocks", f"{image}.encoder.layers.{{}}")
    yield from norm("image/transformer/norm", f"{image}.post_layernorm")
    yield Row("image/pool/probe", f"{image}.head.probe", TOKEN)
    yield from fused("image/pool/attention", f"{image}.head.attention", (".in_proj_weight", ".in_proj_bias"))
    yield from dense("image/pool/attention/out", f"{image}.head.attention.out_proj")
    yield from norm("image/pool/norm", f"{image}.head.layernorm")
    yield from dense("image/pool/mlp/up", f"{image}.head.mlp.fc1")
    yield from dense("image/pool/mlp/down", f"{image}.head.mlp.fc2")
    yield Row("text/embed/token_embed/embedding", f"{text}.embeddings.token_embedding.weight")
    yield Row("text/embed/position", f"{text}.embeddings.position_embedding.weight")
    yield from blocks("text/transformer/blocks", f"{text}.encoder.layers.{{}}")
    yield from norm("text/transformer/norm", f"{text}.final_layer_norm")
    yield from dense("text_projection", f"{text}.head")


def _table(form: Any) -> Table:
    kernel = Row("image/patches/patch_embed/kernel", "vision_model.embeddings.patch_embedding.weight", form)
    return Table((kernel, *_rows()), ignored=(r"(text|vision)_model\.embeddings\.position_ids",))


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.SiglipModel`."""
    return _table(PATCHES)


def naflex_table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.Siglip2Model`."""
    return _table(TRANSPOSED)


def files(config: ConfigDict) -> dict[str, Json]:
    """The image processor's file."""
    processor = processing.write(config.model.encoders.image, "SiglipImageProcessor")
    return {"preprocessor_config.json": processor | {"processor_class": "SiglipProcessor"}}


def naflex_files(config: ConfigDict) -> dict[str, Json]:
    """The image processor's file."""
    image = config.model.encoders.image
    processor = processing.write(image, "Siglip2ImageProcessor") | {
        "processor_class": "Siglip2Processor",
        "patch_size": parse(image.variant)[1],
        "max_num_patches": image.max_patches,
    }
    return {
        "preprocessor_config.json": {
            key: value for key, value in processor.items() if key not in ("size", "do_center_crop")
        }
    }


FAMILIES = (
    Family("siglip", to_config, to_theirs, table, files),
    Family("siglip2", naflex_to_config, naflex_to_theirs, naflex_table, naflex_files),
)
