"""The model families by name, and which one a folder is of."""

from typing import Any

from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.interop import beit, bert, blip, clip, dinov2, siglip, vit, whisper
from mmjax.interop.family import Family
from mmjax.interop.store import Folder

# A new family is a file here and a line below. The name is the `model_type` of its config.json.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        clip.FAMILY,
        *siglip.FAMILIES,
        vit.FAMILY,
        beit.FAMILY,
        dinov2.FAMILY,
        blip.FAMILY,
        bert.FAMILY,
        whisper.FAMILY,
    )
}
# What is read of a folder beside its settings, and what each holds.
FILES: dict[str, type] = {
    "preprocessor_config.json": dict,
    "processor_config.json": dict,
    "generation_config.json": dict,
    "tokenizer_config.json": dict,
    "sentence_bert_config.json": dict,
    "config_sentence_transformers.json": dict,
    "modules.json": list,
    "1_Pooling/config.json": dict,
}


def family_of(folder: Folder) -> tuple[Family, dict[str, Any]]:
    """The family of a folder's model, and the model's settings there.

    Raises:
      UserError: it has no settings, or its family is unknown.
    """
    settings = folder.read_json("config.json")
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{folder.name}: config.json is of a {kind!r} model; {suggest(str(kind), FAMILIES)}")
    return FAMILIES[kind], settings
