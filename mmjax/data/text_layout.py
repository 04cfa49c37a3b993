"""How Hugging Face's tokenizer folders lay out a row of ids: their settings, and what their classes add to them."""

import json
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.data import clip_bpe
from mmjax.errors import UserError

PAD, END = "<pad>", "<eos>"
PAD_ID = 0  # where nothing names a padding token

_SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def _family(bos: str | None, eos: str, pad: str | None, adds: tuple[str, ...], **others: str) -> dict[str, Any]:
    added = {f"add_{name}_token": name in adds for name in ("bos", "eos")}
    return {"bos_token": bos, "eos_token": eos, "pad_token": pad, **others, **added}


# What Hugging Face's classes fill in where tokenizer_config.json is silent: tokenizer_class without "TokenizerFast".
_FAMILIES = {
    "CLIP": _family("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", ("bos", "eos"), unk_token="<|endoftext|>"),
    "GPT2": _family("<|endoftext|>", "<|endoftext|>", None, (), unk_token="<|endoftext|>"),
    "Roberta": _family("<s>", "</s>", "<pad>", ("bos", "eos"), unk_token="<unk>", mask_token="<mask>"),
    "T5": _family(None, "</s>", "<pad>", ("eos",)),
    "MT5": _family(None, "</s>", "<pad>", ("eos",)),
    "Siglip": _family(None, "</s>", "</s>", ("eos",)),
    "Siglip2": _family("<bos>", "<eos>", "<pad>", ("bos",)),
    "Gemma": _family("<bos>", "<eos>", "<pad>", ("bos",)),
    "Llama": _family("<s>", "</s>", None, ("bos",)),
}
MERGES_FAMILIES = ("CLIP", "GPT2", "Roberta")
_SENTENCEPIECE_FAMILIES = ("", "T5", "MT5", "Siglip", "Siglip2", "Gemma", "Llama")
# Those whose add_bos_token and add_eos_token replace the post-processor of tokenizer.json.
_FREE_ENDS = ("GPT2", "Gemma", "Siglip2", "Llama", "PreTrained", "TokenizersBackend")


@dataclass(frozen=True)
class Layout:
    """What becomes a row: a text is cleaned, its ids stand between `before` and `after`, then comes padding."""

    pad_id: int = PAD_ID
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    clean: str = ""  # a name in `CLEANERS`
    once: bool = False  # a text whose own ids end with `after` gets no second one


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a folder, with what its class adds to them; {} where there are none.

    Returns:
      The keys of `tokenizer_config.json` and `special_tokens_map.json`, special tokens as plain strings, and
      `family`: the class without "TokenizerFast".

    Raises:
      UserError: a file is damaged.
    """
    config, tokens, model = (
        _read_object(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    )
    config = tokens | config if "added_tokens_decoder" in config else config | tokens
    if not config:
        return {}
    family = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    # SigLIP 2's checkpoints name Gemma's class, which keeps capitals whatever they say.
    if model.get("model_type") == "siglip2" or (family == "Gemma" and config.get("do_lower_case")):
        family = "Siglip2"
    config["replaces_ends"] = family in _FREE_ENDS and bool({"add_bos_token", "add_eos_token"} & set(config))
    config = family_config(family) | config
    for name in _SPECIAL_TOKENS:
        if isinstance(config.get(name), dict):
            config[name] = config[name].get("content")
    return config


def family_config(family: str) -> dict[str, Any]:
    """The settings of a class of Hugging Face alone."""
    return {**_FAMILIES.get(family, {}), "family": family}


def of_definition(definition: str, config: dict[str, Any]) -> tuple[str, Layout]:
    """The definition of a tokenizer after what the folder's settings change in it, and its layout."""
    import tokenizers

    parts = json.loads(definition)
    _set_case(parts, config)
    # Padding to a fixed length, as files of sentence-transformers have it, is no part of what stands after a text.
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parts | {"padding": None, "truncation": None}))
    _add_tokens(tokenizer, config)
    by_config = tokenizer.post_processor is None or config.get("replaces_ends")
    before, after = _ends(tokenizer.token_to_id, config) if by_config else _ends_of_file(tokenizer)
    pads = (
        _token_id(tokenizer.token_to_id, config, "pad_token"),
        _pad_of_file(tokenizer, parts),
        _token_id(tokenizer.token_to_id, config, "eos_token"),
    )
    return tokenizer.to_str(), Layout(_first(pads, PAD_ID), before, after)


def of_file(tokenizer, parts: dict[str, Any]) -> Layout:
    """The layout of a `tokenizer.json` that no settings belong to.

    Without special tokens by a post-processor, the first token that is usual for it ends texts.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      parts: the file.
    """
    pad = _first((_pad_of_file(tokenizer, parts),), PAD_ID)
    before, after = _ends_of_file(tokenizer)
    if before or after:
        return Layout(pad, before, after)
    end = _first(map(tokenizer.token_to_id, (END, "</s>", "<|endoftext|>", "<|endofprompt|>", "[SEP]")), None)
    return Layout(pad, after=() if end is None else (end,), once=True)


def of_sentencepiece(processor, config: dict[str, Any], path: Path) -> Layout | None:
    """The layout of a sentencepiece model; None where no settings say what it is.

    Args:
      processor: a `sentencepiece.SentencePieceProcessor`.
      config: of `read_config`.
      path: of the model.

    Raises:
      UserError: the class moves the model's ids, or the padding token is unknown.
    """
    family = config.get("family", "")
    if family not in _SENTENCEPIECE_FAMILIES or (not family and path.name == "sentencepiece.bpe.model"):
        raise UserError(
            f"{path}: the ids of {family or 'XLM-R'}'s tokenizer are not known to be those of its sentencepiece model; "
            "give the tokenizer.json that transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes"
        )
    if not family and not config.get("pad_token"):
        return None
    added = {token["content"]: int(index) for index, token in config.get("added_tokens_decoder", {}).items()}

    def find(token: str) -> int | None:
        index = find_piece(processor, token)
        return added.get(token) if index is None else index

    pad = _token_id(find, config, "pad_token", "eos_token")
    if pad is None:
        raise UserError(f"{path}: the padding token {config.get('pad_token')!r} is not in it")
    before, after = _ends(find, config if family else {"add_eos_token": True} | config)
    clean = {"Siglip": "siglip" if config.get("do_lower_case", True) else "siglip_cased", "Siglip2": "lower"}
    return Layout(pad, before, after, clean.get(family, ""))


def special_ids(tokenizer, parts: dict[str, Any]) -> set[int]:
    """The tokens that a `tokenizer.json` calls special, and its unknown one.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      parts: the file.
    """
    added = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unknown = parts["model"].get("unk_token")
    unknown_id = parts["model"].get("unk_id") if unknown is None else tokenizer.token_to_id(unknown)
    return added if unknown_id is None else added | {unknown_id}


def special_pieces(processor) -> list[int]:
    """The pieces of a `sentencepiece.SentencePieceProcessor` that stand for no text."""
    kinds = (processor.is_control, processor.is_unknown, processor.is_unused)
    return [piece for piece in range(processor.vocab_size()) if any(is_kind(piece) for is_kind in kinds)]


def find_piece(processor, piece: str) -> int | None:
    """The id of a piece in a `sentencepiece.SentencePieceProcessor`, None where there is none."""
    index = processor.piece_to_id(piece)
    return index if processor.id_to_piece(index) == piece else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def _set_case(parts: dict[str, Any], config: dict[str, Any]) -> None:
    """What Hugging Face changes in the normalizer of a tokenizer.json."""
    normalizer = parts.get("normalizer")
    if config["family"] == "Siglip2":
        steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
        if steps[:1] != [{"type": "Lowercase"}]:
            steps = [{"type": "Lowercase"}, *filter(None, steps)]
        parts["normalizer"] = {"type": "Sequence", "normalizers": steps}
    if normalizer and normalizer["type"] == "BertNormalizer":
        names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
        names["tokenize_chinese_chars"] = "handle_chinese_chars"
        normalizer.update({ours: config[theirs] for theirs, ours in names.items() if theirs in config})


def _add_tokens(tokenizer, config: dict[str, Any]) -> None:
    """Adds the tokens that only the config names; ids are given in the order that Hugging Face has."""
    import tokenizers

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            known.add(token["content"])
            tokenizer.add_tokens([tokenizers.AddedToken(**token)])
    for token in (config.get(name) for name in _SPECIAL_TOKENS):
        if token and token not in known:
            known.add(token)
            tokenizer.add_special_tokens([token])


def _token_id(find: Callable[[str], int | None], config: dict[str, Any], *names: str) -> int | None:
    """The id of the first of these special tokens that the config names."""
    return next((find(config[name]) for name in names if config.get(name)), None)


def _first(ids: Iterable[int | None], default: Any) -> Any:
    return next((index for index in ids if index is not None), default)


def _pad_of_file(tokenizer, parts: dict[str, Any]) -> int | None:
    padding = parts.get("padding")
    is_clip = tokenizer.token_to_id("<|startoftext|>") is not None
    usual = (PAD, "[PAD]", "<|endoftext|>") if is_clip else (PAD, "[PAD]")
    return padding["pad_id"] if padding else _first(map(tokenizer.token_to_id, usual), None)


def _ends(find: Callable[[str], int | None], config: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and after a text by `add_bos_token` and `add_eos_token`."""
    start = _token_id(find, config, "bos_token") if config.get("add_bos_token") else None
    end = _token_id(find, config, "eos_token") if config.get("add_eos_token") else None
    return () if start is None else (start,), () if end is None else (end,)


def _ends_of_file(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    import tokenizers

    if tokenizer.post_processor is None:
        return (), ()
    # One token of another vocabulary, since there need not be a text that gives a token here.
    single = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    framed = tokenizer.post_process(single)
    place = framed.special_tokens_mask.index(0)
    return tuple(framed.ids[:place]), tuple(framed.ids[place + 1 :])


def _canonicalize(text: str) -> str:
    """Without ASCII punctuation and repeated white space (`prompt_engineering.py` of big_vision; SigLIP's texts)."""
    return _bare(text.replace("▁", " "))


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Named, so that a tokenizer can be saved.
CLEANERS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "open_clip": lambda text: clip_bpe.open_clip_text(text).lower(),
    "open_clip_whitespace": clip_bpe.open_clip_text,
    "open_clip_canonicalize": lambda text: _bare(clip_bpe.open_clip_text(text).replace("_", " ")).lower(),
    "siglip": lambda text: _canonicalize(text.lower()),
    "siglip_cased": _canonicalize,
    "lower": lambda text: "".join(map(str.lower, text)),  # by character: a final sigma is not told apart
}
