"""Tokenizers: text to padded rows of token ids."""

import base64
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int

from mmjax.errors import UserError

PAD, END = "<pad>", "<eos>"
PAD_ID = 0


class Tokenizer(Protocol):
    """What the pipeline and the API need from any tokenizer."""

    vocab_size: int

    def encode(self, texts: Sequence[str], length: int) -> Int[np.ndarray, "texts length"]:
        """Token ids, int32, ended by the end token and padded with 0; long texts keep their end token."""
        ...

    def to_json(self) -> dict:
        """All of the tokenizer as plain JSON, for `from_json`."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library."""

    def __init__(self, definition: str):
        import tokenizers

        self._definition = definition
        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # The same captions come back every epoch, and in training one at a time.
        self._ids = functools.lru_cache(maxsize=100_000)(lambda text: self._tokenizer.encode(text).ids)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self._end = self._first_known(END, "</s>", "<|endoftext|>", "<|endofprompt|>", "[SEP]")
        pad = self._first_known(PAD, "<pad>", "[PAD]")
        if pad not in (None, PAD_ID):
            raise UserError(f"the tokenizer's padding token has id {pad}; mmjax needs it to be {PAD_ID}")

    def _first_known(self, *tokens: str) -> int | None:
        return next((i for i in map(self._tokenizer.token_to_id, tokens) if i is not None), None)

    def encode(self, texts: Sequence[str], length: int) -> Int[np.ndarray, "texts length"]:
        return _pad([self._ids(text) for text in texts], length, self._end)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without padding and special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def to_json(self) -> dict:
        return {"format": "tokenizer.json", "data": json.loads(self._definition)}

    def __reduce__(self):
        return type(self), (self._definition,)


class SentencePieceTokenizer:
    """A sentencepiece `.model`. Ids are moved up where needed so that 0 is padding alone."""

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Models made without a padding piece use id 0 for a real one.
        self._offset = 0 if self._processor.pad_id() == PAD_ID else 1
        self.vocab_size = self._processor.vocab_size() + self._offset
        end = self._processor.eos_id()
        self._end = end + self._offset if end >= 0 else None

    def encode(self, texts: Sequence[str], length: int) -> Int[np.ndarray, "texts length"]:
        rows = [[piece + self._offset for piece in self._processor.encode(text)] for text in texts]
        return _pad(rows, length, self._end)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without padding and end tokens."""
        return self._processor.decode([int(i) - self._offset for i in ids if i not in (PAD_ID, self._end)])

    def to_json(self) -> dict:
        return {"format": "sentencepiece", "data": base64.b64encode(self._model).decode()}

    def __reduce__(self):
        return type(self), (self._model,)


def load(path: str | Path) -> Tokenizer:
    """Loads a Hugging Face `tokenizer.json` or a sentencepiece `.model`.

    Raises:
      UserError: the file is missing or is neither of the two.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    try:
        if Path(path).suffix == ".model":
            return SentencePieceTokenizer(content)
        return HuggingFaceTokenizer(content.decode())
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare Exception and RuntimeError
        raise UserError(f"{path} is neither a tokenizer.json nor a sentencepiece .model: {error}") from error


def from_json(saved: dict) -> Tokenizer:
    """Rebuilds the tokenizer that `to_json` described."""
    if saved["format"] == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(saved["data"]))
    return HuggingFaceTokenizer(json.dumps(saved["data"], ensure_ascii=False))


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


def _pad(rows: Sequence[Sequence[int]], length: int, end: int | None) -> Int[np.ndarray, "texts length"]:
    ids = np.full((len(rows), length), PAD_ID, np.int32)
    for target, row in zip(ids, rows, strict=True):
        row = list(row)
        if end is not None and row[-1:] != [end]:
            row.append(end)
        if len(row) > length:
            row = row[: length - 1] + row[-1:]
        target[: len(row)] = row
    return ids
