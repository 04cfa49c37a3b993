"""Tokenizers: text to padded rows of token ids, the same ids that a checkpoint was trained with.

Where the `tokenizer_config.json` of a checkpoint lies beside its vocabulary, a row is what `transformers` gives with
`padding="max_length", truncation=True, padding_side="right"`. Only sentencepiece models go another way in two rare
cases: what looks like a special token in a text ("</s>") is text, and long stacks of combining marks are normalized
as sentencepiece does it, not as the `tokenizers` library does. And a GemmaTokenizer with `do_lower_case`, which that
class does not read, loses capitals here: SigLIP 2's checkpoints for one resolution say so, and were trained so.
"""

import base64
import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, Int8

from mmjax.data import clip_bpe, text_layout, words
from mmjax.data.records import MAX_CAPTION
from mmjax.data.text_layout import END, PAD, PAD_ID, Layout
from mmjax.errors import UserError, one_line

# What `load` looks for in a folder, and the only files that a tokenizer_config.json beside them is read for.
FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_MASKS = ("[MASK]", "<mask>")


class Tokenizer(Protocol):
    """What the pipeline and the API need from any tokenizer."""

    vocab_size: int
    pad_id: int
    start_id: int | None  # of the first token before a text
    end_id: int | None  # of the first token after it
    mask_id: int | None  # of the token that stands for a hidden one
    special_ids: tuple[int, ...]  # ascending: of all these, and of unknown and any other tokens that stand for no text
    word_marks: Int8[np.ndarray, " vocab"]  # where words begin and end: see `mmjax.data.words`

    def encode(self, texts: Sequence[str], length: int) -> Int[np.ndarray, "texts length"]:
        """Token ids, int32, padded on the right with `pad_id`; long texts keep their start and end tokens.

        Any string will do; what goes beyond `records.MAX_CAPTION` characters is cut off.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a row of ids, without padding, start and end tokens."""
        ...

    def to_json(self) -> dict:
        """All of the tokenizer as plain JSON, for `from_json`."""
        ...


class _Rows:
    """The common part of the tokenizers; they add the two ways between text and bare ids, and what tokens there are."""

    vocab_size: int

    def __init__(self, layout: Layout, mask_id: int | None, others: Iterable[int]):
        """Takes `others`, what the vocabulary itself has of special tokens, beside those of the layout."""
        self.layout = layout
        self.pad_id = layout.pad_id
        self.start_id = layout.before[0] if layout.before else None
        self.end_id = layout.after[0] if layout.after else None
        self.mask_id = mask_id
        special = {layout.pad_id, *layout.before, *layout.after, mask_id, *others} - {None}
        self.special_ids = tuple(sorted(special))
        # The same captions come back every epoch, and in training one at a time.
        self._row = functools.lru_cache(maxsize=100_000)(self._make_row)

    def _ids(self, text: str) -> list[int]:
        raise NotImplementedError

    def _text(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _make_row(self, text: str, length: int) -> Int[np.ndarray, " length"]:
        layout = self.layout
        valid = text.encode("utf-8", "replace").decode()  # lone surrogates
        ids = self._ids(text_layout.CLEANERS[layout.clean](valid))
        ids = ids[: max(0, length - len(layout.before) - len(layout.after))]
        ids = [*layout.before, *ids, *layout.after][:length]
        return np.array(ids + [layout.pad_id] * (length - len(ids)), np.int32)

    def encode(self, texts: Sequence[str], length: int) -> Int[np.ndarray, "texts length"]:
        """See `Tokenizer`."""
        rows = np.empty((len(texts), length), np.int32)
        for index, text in enumerate(texts):
            rows[index] = self._row(text[:MAX_CAPTION], length)
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        left = [int(token) for token in ids]
        if self.layout.before and tuple(left[: len(self.layout.before)]) == self.layout.before:
            left = left[len(self.layout.before) :]
        if self.layout.after and self.layout.after[0] in left:
            left = left[: left.index(self.layout.after[0])]
        else:  # padding comes after the end; before it, the same id can be a token of the text
            while left and left[-1] == self.pad_id:
                left.pop()
        return self._text(left)


class HuggingFaceTokenizer(_Rows):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Args:
      definition: the text of the file.
      layout: without one, what the file says; where that is nothing, texts end with the first known end token.
    """

    def __init__(self, definition: str, layout: Layout | None = None):
        import tokenizers

        parts = json.loads(definition)
        self._definition, self._spelling = definition, words.spelling_of(parts)
        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._end_of_word = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        masks = map(self._tokenizer.token_to_id, _MASKS)
        super().__init__(
            layout or text_layout.of_file(self._tokenizer, parts),
            next((index for index in masks if index is not None), None),
            text_layout.special_ids(self._tokenizer, parts),
        )

    @functools.cached_property
    def word_marks(self) -> Int8[np.ndarray, " vocab"]:
        """See `Tokenizer`."""
        from tokenizers import decoders

        tokens = {index: token for token, index in self._tokenizer.get_vocab().items()}
        decoder = decoders.ByteLevel()
        is_byte_level = self._spelling.space == words.BYTE_SPACE
        text_of = (lambda token: decoder.decode([token])) if is_byte_level else str
        return words.word_marks(tokens, self._spelling, self.special_ids, self.vocab_size, text_of)

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        ends_itself = self.layout.once and ids and (ids[-1],) == self.layout.after
        return ids[:-1] if ends_itself else ids

    def _text(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return (text.replace(self._end_of_word, " ") if self._end_of_word else text).strip()

    def to_json(self) -> dict:
        """See `Tokenizer`."""
        return _json("tokenizer.json", json.loads(self._definition), self.layout)

    def __reduce__(self):
        return type(self), (self._definition, self.layout)


class SentencePieceTokenizer(_Rows):
    """A sentencepiece `.model`.

    Args:
      model: the bytes of the file.
      layout: without one, texts end with the model's end token, and are padded with its padding piece. Models
        without that piece have all their ids moved up by one, so that 0 is padding alone.
      offset: what is added to the model's ids.
    """

    def __init__(self, model: bytes, layout: Layout | None = None, offset: int = 0):
        import sentencepiece

        self._model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        if layout is None:
            pad, end = self.processor.pad_id(), self.processor.eos_id()
            offset = int(pad < 0)
            layout = Layout(max(pad, PAD_ID), after=(end + offset,) if end >= 0 else ())
        self._offset = offset
        self.vocab_size = max(self.processor.vocab_size() + offset, layout.pad_id + 1)
        masks = (text_layout.find_piece(self.processor, piece) for piece in _MASKS)
        mask = next((piece + offset for piece in masks if piece is not None), None)
        super().__init__(layout, mask, (piece + offset for piece in text_layout.special_pieces(self.processor)))

    @functools.cached_property
    def word_marks(self) -> Int8[np.ndarray, " vocab"]:
        """See `Tokenizer`."""
        pieces = range(self.processor.vocab_size())
        tokens = {piece + self._offset: self.processor.id_to_piece(piece) for piece in pieces}
        return words.word_marks(tokens, words.Spelling(space=words.PIECE_SPACE), self.special_ids, self.vocab_size)

    def _ids(self, text: str) -> list[int]:
        return [piece + self._offset for piece in self.processor.encode(text)]

    def _text(self, ids: list[int]) -> str:
        known = range(self.processor.vocab_size())
        return self.processor.decode([token - self._offset for token in ids if token - self._offset in known])

    def to_json(self) -> dict:
        """See `Tokenizer`."""
        data = base64.b64encode(self._model).decode()
        return _json("sentencepiece", data, self.layout) | {"offset": self._offset}

    def __reduce__(self):
        return type(self), (self._model, self.layout, self._offset)


def load(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a `tokenizer.json`, a sentencepiece `.model`, the `bpe_simple_vocab_16e6.txt.gz` of CLIP and open_clip, or a
        folder that Hugging Face's `save_pretrained` wrote: with a `tokenizer.json`, else a `vocab.json` and a
        `merges.txt` of CLIP, GPT-2 or RoBERTa, else a sentencepiece model of T5, SigLIP, Gemma or Llama.

    Raises:
      UserError: nothing is there, it is damaged, or it is of another kind.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = text_layout.read_config(folder) if path.is_dir() or path.name in (*FILES, "merges.txt") else {}
    if path.is_dir():
        # Hugging Face reads SigLIP's texts with sentencepiece, whatever else is there.
        names = ("spiece.model", *FILES) if config.get("family") == "Siglip" else FILES
        path = next((folder / name for name in names if (folder / name).is_file()), folder / "none")
        if path.name == "none":
            raise UserError(f"{folder} holds no tokenizer; it has to have one of: {', '.join(FILES)}")
    try:
        return _read(path, path.read_bytes(), config)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
    except Exception as error:  # both libraries raise bare Exception and RuntimeError
        reason = one_line(error)
        raise UserError(
            f"{path} is neither a tokenizer.json nor a sentencepiece .model nor a vocabulary with merges: {reason}"
        ) from error


def from_json(saved: dict) -> Tokenizer:
    """Rebuilds the tokenizer that `to_json` described."""
    layout = None
    if "layout" in saved:
        fields = saved["layout"]
        layout = Layout(**fields | {name: tuple(fields[name]) for name in ("before", "after")})
    if saved["format"] == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(saved["data"]), layout, saved.get("offset", 0))
    return HuggingFaceTokenizer(json.dumps(saved["data"], ensure_ascii=False), layout)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learns a byte-level BPE vocabulary and writes it as `tokenizer.json`.

    All 256 bytes are in the vocabulary, so any character that was not seen falls back to its
    UTF-8 bytes and no input is unknown (Radford et al. 2019, section 2.2). Text is lower-cased. Words
    end at spaces alone: "medium-dark" can become one token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Prepend(" ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _json(form: str, data: Any, layout: Layout) -> dict:
    return {"format": form, "data": data, "layout": json.loads(json.dumps(dataclasses.asdict(layout)))}


def _read(path: Path, content: bytes, config: dict[str, Any]) -> Tokenizer:
    if path.suffix == ".model":
        bare = SentencePieceTokenizer(content)
        return SentencePieceTokenizer(content, text_layout.of_sentencepiece(bare.processor, config, path))
    if path.suffix == ".gz":
        definition, start, end = clip_bpe.from_open_clip(content)
        return HuggingFaceTokenizer(definition, Layout(PAD_ID, (start,), (end,), "open_clip"))
    if path.name in ("vocab.json", "merges.txt"):
        family = config.get("family") or clip_bpe.guess_family(path.parent)
        if family not in text_layout.MERGES_FAMILIES:
            raise UserError(
                f"{path.parent}: a {family}Tokenizer is read from its tokenizer.json alone, and there is none"
            )
        definition = clip_bpe.from_vocab_and_merges(path.parent, family)
        return HuggingFaceTokenizer(*text_layout.of_definition(definition, text_layout.family_config(family) | config))
    if config:
        return HuggingFaceTokenizer(*text_layout.of_definition(content.decode(), config))
    return HuggingFaceTokenizer(content.decode())
