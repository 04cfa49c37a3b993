"""The model families by name, and which one a folder is of."""

from typing import Any

from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.interop import beit, bert, blip, clip, dinov2, open_clip, siglip, vit, whisper
from mmjax.interop.family import Family
from mmjax.interop.store import Folder

# A new family is a file here and a line below. The name is the `model_type` of its config.json. Where a model fits more
# than one, the first is what it is saved as.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        clip.FAMILY,
        *siglip.FAMILIES,
        open_clip.FAMILY,
        vit.FAMILY,
        beit.FAMILY,
        dinov2.FAMILY,
        blip.FAMILY,
        bert.FAMILY,
        whisper.FAMILY,
    )
}
# Where transformers' weights are, with config.json beside them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
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

    Many folders have a model in two layouts, transformers' and open_clip's: the first is read if its weights are there.

    Raises:
      UserError: it has no settings, or its family is unknown.
    """
    own = folder.read_json("config.json", optional=folder.has(open_clip.FAMILY.settings))
    kind = own.get("model_type")
    if folder.has(open_clip.FAMILY.settings) and not (str(kind) in FAMILIES and any(map(folder.has, _WEIGHTS))):
        return open_clip.FAMILY, folder.read_json(open_clip.FAMILY.settings)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{folder.name}: config.json is of a {kind!r} model; {suggest(str(kind), FAMILIES)}")
    return FAMILIES[kind], own
