"""The tokenizers of open_clip's models: its own vocabulary, or files of Hugging Face beside the weights.

What stands for it in `text_cfg` is `hf_tokenizer_name` (then the files are read, wherever they come from) and how texts
are cleaned before, `tokenizer_kwargs.clean`.
"""

import importlib.util
from pathlib import Path
from typing import Any

from mmjax.data import text as tokenizers
from mmjax.data.text import Tokenizer
from mmjax.errors import UserError
from mmjax.interop import tokenizer_files
from mmjax.interop.family import Json
from mmjax.interop.store import Folder

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
# open_clip's names of how texts are cleaned -> ours, of `mmjax.data.text_layout.CLEANERS`
_CLEANERS = {"lower": "open_clip", "whitespace": "open_clip_whitespace", "canonicalize": "open_clip_canonicalize"}


def read(folder: Folder, settings: Json) -> Tokenizer | None:
    """The tokenizer of a model; None where neither its folder nor an installed open_clip has the vocabulary.

    Raises:
      UserError: the files are damaged, or texts are read in a way that ours are not.
    """
    text = settings["model_cfg"]["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {})
    named, mode = bool(text.get("hf_tokenizer_name")), text.get("tokenizer_mode")
    clean, strips = options.pop("clean", "whitespace" if named else "lower"), options.pop("strip_sep_token", False)
    if mode or options or clean not in _CLEANERS:
        unknown = mode or options or clean
        raise UserError(f"{folder.name}: text_cfg.tokenizer_kwargs, tokenizer_mode: {unknown} is not supported")
    found = tokenizer_files.read(folder) if named else _own(folder)
    if found is None:
        return None
    saved = found.to_json()
    layout = saved["layout"] | {"clean": _CLEANERS[clean]}
    if not named:
        layout["pad_id"] = 0
    if strips:  # the token that separates, which is the last one, becomes padding
        layout["after"] = [0] * len(layout["after"])
    return tokenizers.from_json(saved | {"layout": layout})


def _own(folder: Folder) -> Tokenizer | None:
    """CLIP's vocabulary: open_clip's file in the folder, the same in Hugging Face's form, or that of the package."""
    if folder.has(VOCABULARY):
        return tokenizers.load(folder.path / VOCABULARY)
    found = tokenizer_files.read(folder)
    package = importlib.util.find_spec("open_clip")  # it is not imported: that would import torch
    if found is None and package is not None and package.origin is not None:
        path = Path(package.origin).parent / VOCABULARY
        return tokenizers.load(path) if path.is_file() else None
    return found


def name(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings of a model with what they say of its tokenizer, which is written beside them."""
    saved = tokenizer.to_json()
    clean = saved["layout"]["clean"]
    is_bpe = saved["format"] == "tokenizer.json" and saved["data"]["model"].get("end_of_word_suffix") == "</w>"
    if clean == "open_clip" and is_bpe and not tokenizer.pad_id:  # the vocabulary that open_clip has itself
        return settings
    theirs = {ours: name for name, ours in _CLEANERS.items()} | {"siglip": "canonicalize"}
    named = {"hf_tokenizer_name": ".", "tokenizer_kwargs": {"clean": theirs.get(clean, "whitespace")}}
    model = settings["model_cfg"]
    return settings | {"model_cfg": model | {"text_cfg": model["text_cfg"] | named}}
