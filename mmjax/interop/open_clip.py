"""Models in open_clip's own layout: CLIP, SigLIP and CoCa in `open_clip_config.json` and `open_clip_model.safetensors`.

open_clip computes QuickGELU where `model_cfg.quick_gelu` says so, and in no other case, whatever a model's name is.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.interop import open_clip_table, open_clip_tokenizer, processing, timm_vit
from mmjax.interop.family import Family, Json

# Names of settings -> what open_clip takes where they are not there.
_BLOCK = {
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_TOWER = {
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "final_ln_after_pool": False,
    "output_tokens": False,
    **_BLOCK,
}
_VISION = _TOWER | {
    "width": 768,
    "head_width": 64,
    "patch_size": 16,
    "image_size": 224,
    "patch_dropout": 0.0,
    "pos_embed_type": "learnable",
    "no_ln_pre": False,
    "pool_type": "tok",
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
}
_TIMM = {
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
}
_TEXT = _TOWER | {
    "context_length": 77,
    "vocab_size": 49_408,
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "embed_cls": False,
    "pad_id": 0,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
}
# Of these only `layers`, `width`, `heads`, `context_length` and `ls_init_value` make a difference.
_MULTIMODAL = _TEXT | {"dim_head": 64, "n_queries": 256, "attn_pooler_heads": 8}
_MODEL = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "multimodal_cfg": None,
    "pad_id": 0,
    "quick_gelu": False,
    "custom_text": False,
    "init_logit_scale": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
}
_PREPROCESS = {"resize_mode": "shortest", "interpolation": "bicubic", **processing.OPENAI}
_RESIZES = {"shortest": "center_crop_rounded", "squash": "squash"}
_INTERPOLATIONS = {"bicubic": "bicubic", "random": "bicubic", "bilinear": "bilinear"}  # random only in training
_POOLERS = (True, "parallel", "cascade")
_POOLINGS = {"first": "cls", "last": "last", "argmax": "eos", "eos": "eos"}
_EPSILON = 1e-5


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a model."""
    if "model_cfg" not in theirs:
        raise UserError("open_clip_config.json has no model_cfg")
    model = _filled("model_cfg", theirs["model_cfg"], _MODEL)
    vision, text = model["vision_cfg"], _filled("text_cfg", model["text_cfg"], _TEXT)
    config = configs.default()
    config.model.embed_dim = model["embed_dim"]
    config.model.max_logit_scale = 0.0  # it is clamped in training alone
    scale, bias = model["init_logit_scale"], model["init_logit_bias"]
    config.model.logit_scale = 1 / 0.07 if scale is None else float(f"{math.exp(scale):.12g}")
    config.model.logit_bias = 0.0 if bias is None else float(bias)
    config.model.max_logit_scale = 0.0
    config.model.encoders.image = configs.image_encoder(
        **_image(vision, model["quick_gelu"], model["embed_dim"]), **_preprocess(theirs.get("preprocess_cfg") or {})
    )
    config.model.encoders.text = configs.text_encoder(**_text(text, model["quick_gelu"]))
    config.objectives.contrastive = configs.objective(kind="softmax" if bias is None else "sigmoid")
    if model["multimodal_cfg"] is not None:
        decoder = _decoder(_filled("multimodal_cfg", model["multimodal_cfg"], _MULTIMODAL), text)
        config.model.decoder = configs.decoder(**decoder, **_read(vision))
        config.objectives.captioning = configs.objective(kind="captioning", weight=2.0)  # CoCa, section 4.1
    return config


def _filled(section: str, given: Json, defaults: Json) -> dict[str, Any]:
    """The settings of a section, all of them."""
    for key, value in given.items():
        if key not in defaults:
            raise UserError(f"{section}.{key}: {value!r} is not supported; {suggest(key, defaults)}")
        if key in _BLOCK and value and value != "default":
            raise UserError(f"{section}.{key}: {value!r} is not supported: its blocks have parts that none here has")
    return {**defaults, **given}


def _image(given: Json, quick_gelu: bool, embed_dim: int) -> dict[str, Any]:
    if given.get("timm_model_name"):
        return _timm_image(_filled("vision_cfg", given, _VISION | _TIMM))
    vision = _filled("vision_cfg", given, _VISION)
    if not isinstance(vision["layers"], int):
        raise UserError(f"vision_cfg.layers: {vision['layers']} is a ResNet's, and only Transformers are read")
    if vision["pool_type"] not in ("tok", "avg"):
        raise UserError(f"vision_cfg.pool_type: {vision['pool_type']!r} is neither tok nor avg")
    if vision["attentional_pool"] not in (*_POOLERS, False):
        raise UserError(f"vision_cfg.attentional_pool: {vision['attentional_pool']!r} is none of {_POOLERS}")
    patch, side = (_side(f"vision_cfg.{name}", vision[name]) for name in ("patch_size", "image_size"))
    pooled = {
        "pooling": "cls" if vision["pool_type"] == "tok" else "mean",
        "class_token": vision["pool_type"] != "tok",
        "final_norm": not vision["final_ln_after_pool"],
        "pool_norm": bool(vision["final_ln_after_pool"]),
    }
    if vision["attentional_pool"]:
        pooled |= _pooler(vision, embed_dim)
    return {
        **_tower("vision_cfg", vision, quick_gelu),
        "heads": vision["width"] // vision["head_width"],
        "variant": f"B/{patch}",
        "image_size": side,
        "patch_bias": False,
        "embed_norm": not vision["no_ln_pre"],
        "token_drop": float(vision["patch_dropout"]),
        **pooled,
    }


def _pooler(vision: Json, embed_dim: int) -> dict[str, Any]:
    """CoCa's pooling of images. `attentional_pool` True: of the queries' outputs, normalised, the first one is the
    embedding. "cascade": one more query reads these outputs. "parallel": it reads the tokens, as the others do.
    """
    kind, queries = vision["attentional_pool"], {"query_heads": vision["attn_pooler_heads"]}
    if vision["norm_kwargs"]:
        raise UserError(f"vision_cfg.norm_kwargs: {vision['norm_kwargs']} is not supported with attentional_pool")
    if kind != "parallel":
        queries |= {"queries": vision["attn_pooler_queries"], "query_width": embed_dim}
    if kind is True:
        return queries | {"query_norm": "both", "final_norm": False, "pool_norm": False}
    if vision["width"] != embed_dim:
        raise UserError(f"vision_cfg.attentional_pool: {kind} needs a width of embed_dim, {embed_dim}")
    own = {"query_norm": "input", "pooling": "query", "class_token": True, "final_norm": True, "pool_norm": False}
    return queries | own


def _read(vision: Json) -> dict[str, Any]:
    """What the text decoder reads of an image."""
    if vision.get("timm_model_name"):
        raise UserError("vision_cfg.timm_model_name: such a tower is not supported with multimodal_cfg")
    kind = vision.get("attentional_pool", False)
    if kind != "parallel":
        return {"image_class_token": kind == "cascade"}
    names = {"image_queries": "attn_pooler_queries", "query_heads": "attn_pooler_heads"}
    return {"query_norm": "input"} | {ours: vision.get(name, _VISION[name]) for ours, name in names.items()}


def _decoder(multimodal: Json, text: Json) -> dict[str, Any]:
    """The text decoder of CoCa; what it has of the text tower's settings has to be the default there, or the same."""
    for name in ("norm_kwargs", "act_kwargs"):
        if text[name]:
            raise UserError(f"text_cfg.{name}: {text[name]} is not supported with multimodal_cfg")
    if multimodal["ls_init_value"] != text["ls_init_value"] or multimodal["width"] != text["width"]:
        raise UserError("multimodal_cfg.ls_init_value, width: they are not those of text_cfg")
    if multimodal["context_length"] < text["context_length"]:
        raise UserError("multimodal_cfg.context_length: it is less than that of text_cfg")
    return {
        "depth": multimodal["layers"],
        "width": multimodal["width"],
        "mlp_dim": 4 * multimodal["width"],
        "heads": multimodal["heads"],
        "reads": "text",
        "start": False,
        "cross_mlp": True,
        "head_bias": False,
    }


def _timm_image(vision: Json) -> dict[str, Any]:
    trunk = timm_vit.trunk_of(vision["timm_model_name"])
    if vision["image_size"] != trunk.image_size:
        raise UserError(f"vision_cfg.image_size: {vision['image_size']} is not {vision['timm_model_name']}'s")
    if vision["timm_pool"] != "map" or vision["timm_proj"] not in ("none", "linear"):
        raise UserError(
            f"vision_cfg.timm_pool, timm_proj: {vision['timm_pool']!r} and {vision['timm_proj']!r}; a SigLIP tower is "
            "read with map, and with none or linear"
        )
    return {
        **trunk.size._asdict(),
        "variant": f"B/{trunk.patch}",
        "activation": trunk.activation,
        "image_size": trunk.image_size,
        "pooling": "map",
        "projection": vision["timm_proj"] == "linear",
        "projection_bias": bool(vision["timm_proj_bias"]),
    }


def _text(text: Json, quick_gelu: bool) -> dict[str, Any]:
    if text["embed_cls"]:  # then nothing else is pooled
        class_token = dict.fromkeys(("class_token", "mask_padding", "shifted_mask", "pool_norm"), True)
        own = class_token | {"final_norm": False}
        return _text(text | {"embed_cls": False, "pool_type": "last"}, quick_gelu) | own
    if text["pool_type"] not in _POOLINGS:
        raise UserError(f"text_cfg.pool_type: {text['pool_type']!r} is none of {', '.join(_POOLINGS)}")
    if text["no_causal_mask"] and _POOLINGS[text["pool_type"]] == "eos":
        raise UserError("text_cfg.no_causal_mask: it reads the padding after the end token, which is not supported")
    end = text["eos_id"] if text["pool_type"] == "eos" else text["vocab_size"] - 1  # argmax: the largest id of all
    return {
        **_tower("text_cfg", text, quick_gelu),
        "heads": text["heads"],
        "vocab_size": text["vocab_size"],
        "length": text["context_length"],
        "causal": not text["no_causal_mask"],
        "pooling": _POOLINGS[text["pool_type"]],
        "pad_id": text["pad_id"],
        "projection": text["proj_type"] != "none",
        "projection_bias": bool(text["proj_bias"]),
        **({"end_id": end} if _POOLINGS[text["pool_type"]] == "eos" else {}),
    }


def _tower(section: str, theirs: Json, quick_gelu: bool) -> dict[str, Any]:
    """The settings that both towers have."""
    epsilon = (theirs["norm_kwargs"] or {}).get("eps", _EPSILON)
    for name, known in (("norm_kwargs", {"eps": epsilon}), ("act_kwargs", {"approximate": "tanh"})):
        if theirs[name] and (theirs[name] != known or (name == "act_kwargs" and quick_gelu)):
            raise UserError(f"{section}.{name}: {theirs[name]} is not supported")
    return {
        "width": theirs["width"],
        "depth": theirs["layers"],
        "mlp_dim": int(theirs["width"] * theirs["mlp_ratio"]),
        "activation": "quick_gelu" if quick_gelu else "gelu_tanh" if theirs["act_kwargs"] else "gelu",
        "norm_epsilon": epsilon,
        "layer_scale": theirs["ls_init_value"] or 0.0,
    }


def _side(key: str, size: Any) -> int:
    sides = size if isinstance(size, list | tuple) else [size]
    if len({*sides}) != 1:
        raise UserError(f"{key}: {size} is no square")
    return int(sides[0])


def _preprocess(given: Json) -> dict[str, Any]:
    """How images are read: open_clip resizes as it says here, to the tower's size whatever `size` is."""
    found = _PREPROCESS | {key: value for key, value in given.items() if value is not None}
    for key, known in (("resize_mode", _RESIZES), ("interpolation", _INTERPOLATIONS)):
        if found[key] not in known:
            raise UserError(f"preprocess_cfg.{key}: {found[key]!r} is none of {', '.join(known)}")
    channels = {name: found[name] for name in ("mean", "std")}
    return {
        "resize": _RESIZES[found["resize_mode"]],
        "resample": _INTERPOLATIONS[found["interpolation"]],
        **{name: tuple(x if isinstance(x, list | tuple) else [x] * 3) for name, x in channels.items()},
    }


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The open_clip_config.json of a model."""
    model, image = config.model, config.model.encoders.image
    settings: dict[str, Any] = {"embed_dim": model.embed_dim}
    if model.logit_scale != 1 / 0.07:
        settings["init_logit_scale"] = math.log(model.logit_scale)
    if "sigmoid" in [entry.kind for entry in config.objectives.values()]:
        settings["init_logit_bias"] = model.logit_bias
    settings["quick_gelu"] = "quick_gelu" in (image.activation, model.encoders.text.activation)
    settings["custom_text"] = open_clip_table.is_custom(config)
    settings["vision_cfg"] = _timm_settings(image) if image.pooling == "map" else _vision_settings(config)
    settings["text_cfg"] = _text_settings(model.encoders.text)
    if model.decoder:
        settings["multimodal_cfg"] = _multimodal_settings(config)
        settings["vision_cfg"]["output_tokens"] = settings["text_cfg"]["output_tokens"] = True
    if image.crop_fraction != 1:
        raise UserError(f"open_clip cuts nothing off a resized image: crop_fraction is {image.crop_fraction}")
    preprocess = {"interpolation": image.resample, "resize_mode": "squash" if image.resize == "squash" else "shortest"}
    preprocess |= {"mean": list(image.mean), "std": list(image.std)}
    return {"model_cfg": settings, "preprocess_cfg": preprocess}


def _tower_settings(encoder: ConfigDict) -> dict[str, Any]:
    from mmjax.models.multimodal import tower_size

    size = tower_size(encoder)
    ratio = size.mlp_dim / size.width
    found = {
        "width": size.width,
        "layers": size.depth,
        # Of the product open_clip takes the whole number that is not larger.
        "mlp_ratio": ratio if int(size.width * ratio) == size.mlp_dim else (size.mlp_dim + 0.5) / size.width,
        "act_kwargs": {"approximate": "tanh"} if encoder.activation == "gelu_tanh" else None,
        "norm_kwargs": {"eps": encoder.norm_epsilon} if encoder.norm_epsilon != _EPSILON else None,
        "ls_init_value": encoder.layer_scale or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _vision_settings(config: ConfigDict) -> dict[str, Any]:
    from mmjax.models.multimodal import tower_size
    from mmjax.models.variants import parse

    image = config.model.encoders.image
    size = tower_size(image)
    found = {
        **_tower_settings(image),
        "image_size": image.image_size,
        "patch_size": parse(image.variant)[1],
        "head_width": size.width // size.heads,
        "no_ln_pre": not image.embed_norm,
        "pool_type": "avg" if image.pooling == "mean" else "tok",
        "final_ln_after_pool": image.pool_norm,
    }
    queries = image.queries or config.model.decoder.get("image_queries", 0)
    if queries:
        kind = "parallel" if not image.queries else "cascade" if image.pooling == "query" else True
        heads = image.query_heads or size.heads
        found |= {"attentional_pool": kind, "attn_pooler_queries": queries, "attn_pooler_heads": heads}
    return found


def _timm_settings(image: ConfigDict) -> dict[str, Any]:
    from mmjax.models.multimodal import tower_size
    from mmjax.models.variants import parse

    trunk = timm_vit.Trunk(tower_size(image), parse(image.variant)[1], image.image_size, image.activation)
    return {
        "image_size": image.image_size,
        "timm_model_name": timm_vit.name_of(trunk),
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "linear" if image.projection else "none",
        **({"timm_proj_bias": True} if image.projection_bias else {}),
    }


def _text_settings(text: ConfigDict) -> dict[str, Any]:
    from mmjax.models.multimodal import tower_size

    if text.class_token:
        pooling = {"embed_cls": True}
    elif text.pooling == "eos" and text.end_id != text.vocab_size - 1:
        pooling = {"pool_type": "eos", "eos_id": text.end_id}
    else:
        pooling = {"pool_type": {ours: theirs for theirs, ours in _POOLINGS.items() if theirs != "eos"}[text.pooling]}
    return {
        **_tower_settings(text),
        "heads": tower_size(text).heads,
        "context_length": text.length,
        "vocab_size": text.vocab_size,
        "no_causal_mask": not text.causal,
        "pad_id": text.pad_id,
        "proj_bias": text.projection_bias,
        **({} if text.projection else {"proj_type": "none"}),
        **pooling,
    }


def _multimodal_settings(config: ConfigDict) -> dict[str, Any]:
    from mmjax.models.multimodal import part_size, tower_size

    text = config.model.encoders.text
    part = part_size(config.model.decoder.to_dict(), tower_size(text))
    found = {"layers": part["depth"], "width": part["width"], "heads": part["heads"], "context_length": text.length}
    scale = {"ls_init_value": text.layer_scale} if text.layer_scale else {}
    return found | scale | {"vocab_size": text.vocab_size}


FAMILY = Family(
    "open_clip",
    to_config,
    to_theirs,
    open_clip_table.table,
    settings="open_clip_config.json",
    weights="open_clip_model.safetensors",
    read_tokenizer=open_clip_tokenizer.read,
    name_tokenizer=open_clip_tokenizer.name,
)
