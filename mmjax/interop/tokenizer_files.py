"""A tokenizer of ours as the files that `transformers` reads."""

import base64
import json
from pathlib import Path
from typing import Any

from mmjax.data.text import FILES, Tokenizer, load
from mmjax.files import write_atomically
from mmjax.interop.store import Folder


def read(folder: Folder) -> Tokenizer | None:
    """The tokenizer of a folder of Hugging Face; None where there is none."""
    return load(folder.path) if any(map(folder.has, FILES)) else None


def write(folder: Path, tokenizer: Tokenizer, length: int, family: str) -> None:
    """Writes `tokenizer.json` (or `spiece.model`) and `tokenizer_config.json`.

    Args:
      folder: where to.
      tokenizer: of a model.
      length: at which its texts are cut off.
      family: of the model.
    """
    saved = tokenizer.to_json()
    if saved["format"] == "sentencepiece":
        write_atomically(folder / "spiece.model", base64.b64decode(saved["data"]))
        return
    definition = saved["data"]
    vocabulary = definition["model"]["vocab"]
    added = {token["id"]: token["content"] for token in definition.get("added_tokens", ())}
    pieces = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((piece, i) for i, (piece, _) in enumerate(vocabulary))
    )
    names = {index: piece for piece, index in pieces} | added
    layout = saved["layout"]
    definition = definition | {"post_processor": _template(layout, names), "padding": None, "truncation": None}
    write_atomically(folder / "tokenizer.json", json.dumps(definition, ensure_ascii=False).encode())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    # A padding token becomes a special one there: a piece of text, as it is in open_clip's vocabulary, must not.
    pad_id = tokenizer.pad_id if tokenizer.pad_id in added else tokenizer.end_id
    special = {"pad": pad_id, "bos": tokenizer.start_id, "eos": tokenizer.end_id, "mask": tokenizer.mask_id}
    settings |= {f"{name}_token": names[index] for name, index in special.items() if index in names}
    write_atomically(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())


def _template(layout: dict[str, Any], names: dict[int, str]) -> dict[str, Any] | None:
    """The post-processor that puts a row's first and last tokens around a text."""
    before, after = layout["before"], layout["after"]
    if not before and not after:
        return None
    around = [[{"SpecialToken": {"id": names[index], "type_id": 0}} for index in part] for part in (before, after)]
    single = [*around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1]]
    tokens = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in (*before, *after)}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
