"""The model families by name, and which one a folder is of."""

from typing import Any

from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.interop import clip, whisper
from mmjax.interop.family import Family
from mmjax.interop.store import Folder

# A new family is a file here and a line below. The name is the `model_type` of its config.json.
FAMILIES: dict[str, Family] = {family.name: family for family in (clip.FAMILY, whisper.FAMILY)}
# What is read of a folder beside its settings.
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "sentence_bert_config.json",
    "modules.json",
)


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
