"""Where words begin and end in a row of token ids, for masking whole words.

Each token of a vocabulary has marks: STARTS, ENDS, both or none. The token at place i of a row begins a word where its
own marks have STARTS, or those of the token before it have ENDS, or i is 0; else it continues the word before it:

    begins = (marks[ids] & STARTS) | (marks[previous_ids] & ENDS)

It takes both because vocabularies differ in what they mark: GPT-2's "Ġfox" and sentencepiece's "▁fox" begin a word,
BERT's "##es" continues one, CLIP's "fox</w>" ends one.
"""

import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int8

STARTS, ENDS = 1, 2
BYTE_SPACE, PIECE_SPACE = "Ġ", "▁"  # a space, in byte-level vocabularies and in those after sentencepiece

# Beginnings of the Unicode names of letters that are written without spaces between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary tells where words begin or end: by one of these, or every token is a word.

    `end` closes the last token of a word, `inside` opens every one but the first, `space` opens the first.
    """

    end: str = ""
    inside: str = ""
    space: str = ""


def spelling_of(definition: Mapping[str, Any]) -> Spelling:
    """The spelling of a `tokenizer.json` of the Hugging Face `tokenizers` library, given as its JSON object."""
    model = definition["model"]
    if end := model.get("end_of_word_suffix"):
        return Spelling(end=end)
    if inside := model.get("continuing_subword_prefix"):
        return Spelling(inside=inside)
    if model.get("type") == "WordLevel":
        return Spelling()
    is_byte_level = '"ByteLevel"' in json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
    return Spelling(space=BYTE_SPACE if is_byte_level else PIECE_SPACE)


def word_marks(
    tokens: Mapping[int, str],
    spelling: Spelling,
    special: Iterable[int],
    size: int,
    text_of: Callable[[str], str] = str,
) -> Int8[np.ndarray, " vocab"]:
    """The marks of all tokens of a vocabulary.

    A special token is a word. Where `spelling.space` decides, so is a token of nothing but punctuation, symbols, or
    letters of scripts without spaces, because no space need follow it.

    Args:
      tokens: id -> the token as the vocabulary spells it.
      spelling: of the vocabulary. Where none of its tokens begins with `space`, every token is a word.
      special: the ids of special tokens.
      size: of the vocabulary.
      text_of: what a token is in a text, once `space` is taken from its beginning.
    """
    end, inside = spelling.end, spelling.inside
    space = spelling.space if any(token.startswith(spelling.space) for token in tokens.values()) else ""
    marks = np.zeros(size, np.int8)
    for index, token in tokens.items():
        if end:
            marks[index] = ENDS if token.endswith(end) else 0
        elif inside:
            marks[index] = 0 if token.startswith(inside) else STARTS
        elif not space or _is_word(text_of(token.removeprefix(space))):
            marks[index] = STARTS | ENDS
        else:
            marks[index] = STARTS if token.startswith(space) else 0
    marks[[*special]] = STARTS | ENDS
    return marks


def _is_word(text: str) -> bool:
    return bool(text) and all(map(_stands_alone, text))


def _stands_alone(character: str) -> bool:
    if character == "\N{REPLACEMENT CHARACTER}":  # some of the bytes of a character
        return False
    if character.isspace() or unicodedata.category(character)[0] in "PS":
        return True
    return unicodedata.name(character, "").startswith(_UNSPACED)
