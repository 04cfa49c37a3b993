"""BLIP ("BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation", Li
et al. 2022), as transformers' `BlipForConditionalGeneration` (captions) and `BlipForImageTextRetrieval` have it.

In the latter one text tower does two things: alone it embeds a text, and attending to an image it says whether they
belong together. BLIP's own code then reads [ENC] in place of the first token; transformers does not, and what is here
agrees with transformers. The temperature of the contrastive loss is in no checkpoint: `similarity` takes the one that
training started from.

Captions are those of transformers, too, but for three things: padding is never written here; a search with beams and a
`length_penalty` divides by another length (see `mmjax.models.generate.Strategy`); and a prompt beside longer ones is
continued after its own last token, not after its padding.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop import bert, processing
from mmjax.interop.clip import tower, tower_settings
from mmjax.interop.family import Family, Json
from mmjax.interop.table import PATCHES, TOKEN, Row, Table, dense, fused, norm

CAPTIONS, RETRIEVAL = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
_PARTS = {CAPTIONS: {"image", "decoder"}, RETRIEVAL: {"image", "text", "fusion", "matching"}}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "image_size": 384,
    "patch_size": 16,
}
_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "vocab_size": 30_524,
    "max_position_embeddings": 512,
    "bos_token_id": 30_522,
    "sep_token_id": 102,
    "pad_token_id": 0,
    "max_length": 20,  # of what it writes, after its prompt; transformers' default for all models
}
_IMAGE = {"resize": "squash", **processing.OPENAI}
_TEMPERATURE = 0.07
_EMBED_DIM = 256


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a BLIP model."""
    kind = (theirs.get("architectures") or [None])[0]
    if kind not in _PARTS:
        raise UserError(f"config.json: of BLIP's models {' and '.join(_PARTS)} can be read, and this is a {kind}")
    text, vision = _TEXT | theirs.get("text_config", {}), _VISION | theirs.get("vision_config", {})
    bert.check_fixed({name: value for name, value in text.items() if name != "is_decoder"})
    processor = files.get("preprocessor_config.json", {})
    image = tower(vision) | processing.read(processor, vision["image_size"], _IMAGE)
    image |= {"variant": f"B/{vision['patch_size']}", "pooling": "cls", "projection_bias": True}
    config = configs.default()
    config.model.logit_scale, config.model.logit_bias = 1 / _TEMPERATURE, 0.0
    longest = files.get("tokenizer_config.json", {}).get("model_max_length") or text["max_position_embeddings"]
    config.model.encoders.text = bert.text_encoder(
        text,
        length=int(min(text["max_position_embeddings"], longest)),
        pooling="cls",
        projection_bias=True,
        end_id=text["sep_token_id"],
    )
    if kind == CAPTIONS:
        config.model.embed_dim = vision["hidden_size"]
        config.model.encoders.image = configs.image_encoder(**image, projection=False)
        config.model.decoder = configs.decoder(
            depth=text["num_hidden_layers"],
            start=False,
            start_id=text["bos_token_id"],
            max_new_tokens=text["max_length"],
            tied=True,
            transform=True,
        )
        config.objectives.captioning = configs.objective(kind="captioning")
        return config
    config.model.embed_dim = theirs.get("image_text_hidden_size", _EMBED_DIM)
    config.model.encoders.image = configs.image_encoder(**image)
    config.model.fusion = configs.fusion(depth=0, reads="tower", pooling="cls")
    config.objectives.contrastive = configs.objective(kind="softmax")
    config.objectives.matching = configs.objective(kind="matching")
    return config


def _kind(config: ConfigDict) -> str:
    from mmjax.objectives import parts_of

    found = parts_of(config)
    for kind, parts in _PARTS.items():
        if parts == found:
            return kind
    raise UserError(f"this is no model of the family blip: it consists of {', '.join(sorted(found))}")


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a BLIP model."""
    from mmjax.models.variants import parse

    model, kind = config.model, _kind(config)
    image, text = model.encoders.image, model.encoders.text
    captions = kind == CAPTIONS
    return {
        "model_type": "blip",
        "architectures": [kind],
        "image_text_hidden_size": _EMBED_DIM if captions else model.embed_dim,
        "vision_config": tower_settings(image)
        | {"model_type": "blip_vision_model", "image_size": image.image_size, "patch_size": parse(image.variant)[1]},
        "text_config": bert.text_settings(text)
        | {
            "model_type": "blip_text_model",
            "is_decoder": True,
            "encoder_hidden_size": tower_settings(image)["hidden_size"],
            "bos_token_id": model.decoder.start_id if captions else text.vocab_size - 2,
            "sep_token_id": text.end_id,
            "max_length": (model.decoder.max_new_tokens or text.length) if captions else _TEXT["max_length"],
        },
    }


def vision_rows(theirs: str) -> Iterator[Row]:
    """The rows of the image tower."""
    ours, blocks, layer = "image", "image/transformer/blocks", f"{theirs}.encoder.layers.{{}}"
    yield Row(f"{ours}/class_token", f"{theirs}.embeddings.class_embedding", TOKEN)
    yield Row(f"{ours}/positions/position", f"{theirs}.embeddings.position_embedding", TOKEN)
    yield Row(f"{ours}/patches/patch_embed/kernel", f"{theirs}.embeddings.patch_embedding.weight", PATCHES)
    yield Row(f"{ours}/patches/patch_embed/bias", f"{theirs}.embeddings.patch_embedding.bias")
    yield from fused(f"{blocks}/attention", f"{layer}.self_attn.qkv")
    yield from dense(f"{blocks}/attention/out", f"{layer}.self_attn.projection")
    yield from norm(f"{blocks}/norm1", f"{layer}.layer_norm1")
    yield from dense(f"{blocks}/mlp/up", f"{layer}.mlp.fc1")
    yield from dense(f"{blocks}/mlp/down", f"{layer}.mlp.fc2")
    yield from norm(f"{blocks}/norm2", f"{layer}.layer_norm2")
    yield from norm(f"{ours}/transformer/norm", f"{theirs}.post_layernorm")


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of a BLIP model."""
    captions = _kind(config) == CAPTIONS
    ours, theirs = ("decoder", "text_decoder.bert") if captions else ("text", "text_encoder")
    rows = [
        *vision_rows("vision_model"),
        *bert.embeddings(f"{ours}/embed", f"{theirs}.embeddings"),
        *bert.blocks(f"{ours}/transformer/blocks", f"{theirs}.encoder.layer.{{}}", cross=True),
    ]
    tied = {}
    if captions:
        predictions = "text_decoder.cls.predictions"
        rows += bert.head("decoder/token_head", predictions)
        tied = bert.tied_head(predictions, f"{theirs}.embeddings.word_embeddings.weight")
    else:
        rows += dense("image_projection", "vision_proj")
        rows += dense("text_projection", "text_proj")
        rows += dense("fusion/match_head", "itm_head")
    fixed = {"logit_scale": math.log(1 / _TEMPERATURE), "logit_bias": 0.0}
    return Table(tuple(rows), fixed, (r".*\.embeddings\.position_ids",), tied)


def files(config: ConfigDict) -> dict[str, Json]:
    """The image processor's file."""
    processor = processing.write(config.model.encoders.image, "BlipImageProcessor")
    return {"preprocessor_config.json": processor | {"processor_class": "BlipProcessor"}}


FAMILY = Family("blip", to_config, to_theirs, table, files)
