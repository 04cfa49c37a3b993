"""CLIP ("Learning Transferable Visual Models From Natural Language Supervision", Radford et al. 2021), as
`transformers.CLIPModel` has it.

Whether a model uses QuickGELU is in its config.json (`hidden_act`), and is not guessed: OpenAI's do, most others not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop import processing
from mmjax.interop.family import Family, Json
from mmjax.interop.table import PATCHES, ROW, SAME, Row, Table, dense, norm

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_TOWER = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT = _TOWER | {"vocab_size": 49_408, "max_position_embeddings": 77, "eos_token_id": 49_407}
_VISION = _TOWER | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_IMAGE = {"resize": "center_crop", **processing.OPENAI}


def tower(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that both towers of the CLIP-like families have."""
    if theirs["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {theirs['hidden_act']!r} is none of {', '.join(ACTIVATIONS)}")
    return {
        "width": theirs["hidden_size"],
        "mlp_dim": theirs["intermediate_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "activation": ACTIVATIONS[theirs["hidden_act"]],
        "norm_epsilon": theirs["layer_norm_eps"],
    }


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a CLIP model."""
    text, vision = _TEXT | theirs.get("text_config", {}), _VISION | theirs.get("vision_config", {})
    config = configs.default()
    config.model.embed_dim = theirs.get("projection_dim", 512)
    config.model.logit_scale, config.model.logit_bias, config.model.max_logit_scale = 1 / 0.07, 0.0, 0.0
    config.model.encoders.image = configs.image_encoder(
        **tower(vision),
        variant=f"B/{vision['patch_size']}",
        pooling="cls",
        patch_bias=False,
        embed_norm=True,
        **processing.read(files.get("preprocessor_config.json", {}), vision["image_size"], _IMAGE),
    )
    # Models of before 2023 say 2, which is not their end token: that is the last of the vocabulary.
    end = text["eos_token_id"] if text["eos_token_id"] != 2 else text["vocab_size"] - 1
    config.model.encoders.text = configs.text_encoder(
        **tower(text),
        vocab_size=text["vocab_size"],
        length=text["max_position_embeddings"],
        causal=True,
        pooling="eos",
        end_id=end,
    )
    config.objectives.contrastive = configs.objective(kind="softmax")
    return config


def tower_settings(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """`tower`, the other way."""
    from mmjax.models.multimodal import tower_size

    size = tower_size(encoder)
    return {
        "hidden_size": size.width,
        "intermediate_size": size.mlp_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "hidden_act": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[encoder["activation"]],
        "layer_norm_eps": encoder["norm_epsilon"],
    }


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a CLIP model."""
    from mmjax.models.variants import parse

    image, text = config.model.encoders.image, config.model.encoders.text
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.model.embed_dim,
        "vision_config": tower_settings(image)
        | {"model_type": "clip_vision_model", "image_size": image.image_size, "patch_size": parse(image.variant)[1]},
        "text_config": tower_settings(text)
        | {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.length,
            "eos_token_id": text.end_id,
            "bos_token_id": text.end_id - 1,
            "pad_token_id": text.pad_id,
        },
    }


def blocks(ours: str, theirs: str) -> Iterator[Row]:
    """The rows of a tower's layers, in CLIP's and SigLIP's names."""
    for name in ("query", "key", "value"):
        yield from dense(f"{ours}/attention/{name}", f"{theirs}.self_attn.{name[0]}_proj")
    yield from dense(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj")
    yield from norm(f"{ours}/norm1", f"{theirs}.layer_norm1")
    yield from dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
    yield from dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    yield from norm(f"{ours}/norm2", f"{theirs}.layer_norm2")


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.CLIPModel`."""
    image, text = "vision_model", "text_model"
    rows = [
        Row("logit_scale", "logit_scale", SAME),
        Row("image/class_token", f"{image}.embeddings.class_embedding", ROW),
        Row("image/patches/patch_embed/kernel", f"{image}.embeddings.patch_embedding.weight", PATCHES),
        Row("image/positions/position", f"{image}.embeddings.position_embedding.weight"),
        *norm("image/embed_norm", f"{image}.pre_layrnorm"),
        *blocks("image/transformer/blocks", f"{image}.encoder.layers.{{}}"),
        *norm("image/transformer/norm", f"{image}.post_layernorm"),
        *dense("image_projection", "visual_projection", bias=False),
        Row("text/embed/token_embed/embedding", f"{text}.embeddings.token_embedding.weight"),
        Row("text/embed/position", f"{text}.embeddings.position_embedding.weight"),
        *blocks("text/transformer/blocks", f"{text}.encoder.layers.{{}}"),
        *norm("text/transformer/norm", f"{text}.final_layer_norm"),
        *dense("text_projection", "text_projection", bias=False),
    ]
    return Table(tuple(rows), {"logit_bias": 0.0}, (r"(text|vision)_model\.embeddings\.position_ids",))


def files(config: ConfigDict) -> dict[str, Json]:
    """The image processor's file."""
    return {"preprocessor_config.json": processing.write(config.model.encoders.image, "CLIPImageProcessor")}


FAMILY = Family("clip", to_config, to_theirs, table, files)
