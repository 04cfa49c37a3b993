"""What a model family is: the settings of another library and ours, both ways, and the table of its parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mmjax.config import PARTS
from mmjax.data.text import Tokenizer
from mmjax.errors import UserError
from mmjax.interop import tokenizer_files
from mmjax.interop.store import Folder
from mmjax.interop.table import Table

Json = Mapping[str, Any]


class Family(NamedTuple):
    """A family of models; one file here.

    Fields:
      to_config: (their settings, those of the tokenizer's and processors' files by name) -> our config.
      to_theirs: our config -> their settings. Raises UserError where the family has no such model.
      table: our config -> the table of parameters.
      files: our config -> JSON files that are written beside config.json, by name.
      settings: the file that their settings are in.
      weights: the file that the tensors are written to.
      read_tokenizer: (the folder, their settings) -> the tokenizer, None where there is none.
      name_tokenizer: (their settings, the tokenizer) -> their settings, with what they say of it. It is written in any
        case as `tokenizer_files.write` does.
    """

    name: str
    to_config: Callable[[Json, Mapping[str, Json]], ConfigDict]
    to_theirs: Callable[[ConfigDict], dict[str, Any]]
    table: Callable[[ConfigDict], Table]
    files: Callable[[ConfigDict], dict[str, Json]] = lambda config: {}
    settings: str = "config.json"
    weights: str = "model.safetensors"
    read_tokenizer: Callable[[Folder, Json], Tokenizer | None] = lambda folder, settings: tokenizer_files.read(folder)
    name_tokenizer: Callable[[dict[str, Any], Tokenizer], dict[str, Any]] = lambda settings, tokenizer: settings


# What changes how fast a tower runs or what training does, and not what it computes.
_FREE = ("variant", "remat", "unroll", "token_drop", "tokenizer", "resize")


def architecture(config: ConfigDict) -> dict[str, Any]:
    """What of a config decides which parameters a model has and what it computes from them."""
    from mmjax.models.multimodal import part_size, tower_size
    from mmjax.models.variants import parse

    def bound(settings: Json) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key not in _FREE}

    model = config.model.to_dict()
    for name in PARTS:
        if model[name]:
            model[name] = bound(part_size(model[name], tower_size(model["encoders"]["text"])))
    for name, encoder in model["encoders"].items():
        patch = parse(encoder["variant"])[1]
        model["encoders"][name] = bound(encoder) | tower_size(encoder)._asdict() | {"patch": patch}
    return model


def check_same(family: str, ours: ConfigDict, family_has: ConfigDict) -> None:
    """Raises UserError, naming the settings, where a config of ours is not that of a family's model."""
    from mmjax.config import flatten

    own, theirs = (dict(flatten(architecture(config))) for config in (ours, family_has))
    keys = sorted(key for key in own | theirs if own.get(key) != theirs.get(key))
    if keys:
        changes = ", ".join(f"model.{key} is {own.get(key)!r} and not {theirs.get(key)!r}" for key in keys)
        raise UserError(f"this is no model of the family {family}: {changes}")
