"""A tokenizer of ours as the files that `transformers` reads."""

import base64
import json
from typing import Any

from mmjax.data.text import FILES, SentencePieceTokenizer, Tokenizer, load
from mmjax.errors import UserError
from mmjax.interop.store import Folder

# The classes that read sentencepiece models, by how a text is cleaned, and their settings. T5's is the plain one.
_SENTENCEPIECE = {
    "siglip": {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True},
    "siglip_cased": {"tokenizer_class": "SiglipTokenizer", "do_lower_case": False},
    "": {"tokenizer_class": "T5Tokenizer", "extra_ids": 0},
}

_CLASSIFYING = ("bert", "blip")  # families whose texts begin with a token for classification, and end with a separator


def read(folder: Folder) -> Tokenizer | None:
    """The tokenizer of a folder of Hugging Face; None where there is none."""
    return load(folder.path) if any(map(folder.has, FILES)) else None


def contents(tokenizer: Tokenizer, length: int, family: str) -> dict[str, bytes]:
    """The files by name: `tokenizer.json` (or `spiece.model`) and `tokenizer_config.json`.

    Args:
      tokenizer: of a model.
      length: at which its texts are cut off.
      family: of the model.

    Raises:
      UserError: transformers has no class that would give the same ids.
    """
    saved = tokenizer.to_json()
    settings = {"model_max_length": length, "padding_side": "right", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, SentencePieceTokenizer):
        settings |= _of_sentencepiece(tokenizer, saved["offset"])
        return {"spiece.model": base64.b64decode(saved["data"]), "tokenizer_config.json": _json(settings)}
    if family != "open_clip" and saved["layout"]["clean"].startswith("open_clip"):
        raise UserError(
            "open_clip cleans this model's texts before it cuts them into tokens, and transformers would not: write it "
            "with --family=open_clip"
        )
    definition = saved["data"]
    vocabulary = definition["model"]["vocab"]
    added = {token["id"]: token["content"] for token in definition.get("added_tokens", ())}
    pieces = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((piece, i) for i, (piece, _) in enumerate(vocabulary))
    )
    names = {index: piece for piece, index in pieces} | added
    layout = saved["layout"]
    definition = definition | {"post_processor": _template(layout, names), "padding": None, "truncation": None}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if family == "siglip2":  # whose class puts no tokens around a text but by these
        ends = {"add_bos_token": bool(layout["before"]), "add_eos_token": bool(layout["after"])}
        settings |= {"tokenizer_class": "Siglip2Tokenizer", **ends}
    first, last = ("cls", "sep") if family in _CLASSIFYING else ("bos", "eos")
    # A padding token becomes a special one there: a piece of text, as it is in open_clip's vocabulary, must not.
    pad_id = tokenizer.pad_id if tokenizer.pad_id in added else tokenizer.end_id
    special = {"pad": pad_id, first: tokenizer.start_id, last: tokenizer.end_id, "mask": tokenizer.mask_id}
    settings |= {f"{name}_token": names[index] for name, index in special.items() if index in names}
    return {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False).encode(),
        "tokenizer_config.json": _json(settings),
    }


def _json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2) + "\n").encode()


def _of_sentencepiece(tokenizer: SentencePieceTokenizer, offset: int) -> dict[str, Any]:
    """What the tokenizer_config.json says of the class and its special tokens."""
    layout, processor = tokenizer.layout, tokenizer.processor
    pieces = range(processor.vocab_size())
    has_class = layout.clean in _SENTENCEPIECE and not offset and not layout.before and len(layout.after) == 1
    fits_t5 = processor.unk_id() == 2 and layout.after[:1] == (processor.piece_to_id("</s>"),)  # all that it can have
    if not has_class or layout.pad_id not in pieces or not (layout.clean or fits_t5):
        raise UserError(
            "this model's sentencepiece tokenizer cannot be saved: no class of transformers gives the same ids"
        )
    tokens = {"pad": layout.pad_id, "eos": layout.after[0], "unk": processor.unk_id()}
    return _SENTENCEPIECE[layout.clean] | {f"{name}_token": processor.id_to_piece(tokens[name]) for name in tokens}


def _template(layout: dict[str, Any], names: dict[int, str]) -> dict[str, Any] | None:
    """The post-processor that puts a row's first and last tokens around a text."""
    before, after = layout["before"], layout["after"]
    if not before and not after:
        return None
    around = [[{"SpecialToken": {"id": names[index], "type_id": 0}} for index in part] for part in (before, after)]
    single = [*around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1]]
    tokens = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in (*before, *after)}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
