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
TENSORS = "tensors"  # among a folder's files: the names of all tensors (the keys), where they are known


class Family(NamedTuple):
    """A family of models; one file here.

    Fields:
      to_config: (their settings, those of the tokenizer's and processors' files by name, and TENSORS) -> our config.
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
_FREE = ("variant", "remat", "unroll", "token_drop", "tokenizer", "resize", "resample", "crop_fraction")
_FREE_PARTS = ("remat", "unroll", "max_new_tokens")


def architecture(config: ConfigDict) -> dict[str, Any]:
    """What of a config decides which parameters a model has and what it computes from them."""
    from mmjax.models.multimodal import part_size, positions_of, tower_size
    from mmjax.models.variants import parse
    from mmjax.objectives import parts_of

    model, parts = config.model.to_dict(), parts_of(config)
    model.pop("max_logit_scale")  # what is saved is below it
    text = model["encoders"].get("text")
    model["parts"] = sorted(parts)
    for name in PARTS:
        own = part_size(model[name], tower_size(text)) if name in parts else {}
        model[name] = {key: value for key, value in own.items() if key not in _FREE_PARTS}
    # A text tower that is not built says how texts are read.
    model["encoders"] = {name: each for name, each in model["encoders"].items() if name in parts or name == "text"}
    for name, encoder in model["encoders"].items():
        own = {key: value for key, value in encoder.items() if key not in _FREE}
        model["encoders"][name] = own | tower_size(encoder)._asdict() | {"patch": parse(encoder["variant"])[1]}
    if text:
        del model["encoders"]["text"]["length"]  # where texts are cut off, which is no parameter
        model["encoders"]["text"]["positions"] = positions_of(text)
    return model


def check_same(family: str, ours: ConfigDict, family_has: ConfigDict) -> None:
    """Raises UserError, naming the settings, where a config of ours is not that of a family's model."""
    from mmjax.config import flatten

    own, theirs = (dict(flatten(architecture(config))) for config in (ours, family_has))
    keys = sorted(key for key in own | theirs if own.get(key) != theirs.get(key))
    if keys:
        changes = ", ".join(f"model.{key} is {own.get(key)!r} and not {theirs.get(key)!r}" for key in keys)
        raise UserError(f"this is no model of the family {family}: {changes}")
