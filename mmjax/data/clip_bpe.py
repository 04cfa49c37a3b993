"""The tokenizers that come as a vocabulary with merges: CLIP's, GPT-2's and RoBERTa's.

Each is written as a definition of the `tokenizers` library, so that `mmjax.data.text` knows one form alone.
"""

import gzip
import html
import json
import re
import unicodedata
from pathlib import Path

# Contractions, then runs of letters, single digits, runs of anything else (the code of Radford et al. 2021,
# "Learning Transferable Visual Models From Natural Language Supervision").
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_RUNS = r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"
_START, _END = "<start_of_text>", "<end_of_text>"
_OPEN_CLIP_MERGES = 49_152 - 256 - 2  # of the 262,145 in the file

_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")


def guess_family(folder: Path) -> str:
    """ "CLIP" if the `vocab.json` of a folder marks the ends of words as CLIP's does, else "GPT2"."""
    vocab = json.loads((folder / "vocab.json").read_bytes())
    return "CLIP" if any(token.endswith(_END_OF_WORD) for token in vocab) else "GPT2"


def from_vocab_and_merges(folder: Path, family: str) -> str:
    """The definition behind the `vocab.json` and `merges.txt` of a Hugging Face folder; without special tokens.

    Args:
      folder: holds the two files.
      family: "CLIP" for CLIP's own cleaning and splitting, else those of GPT-2.

    Raises:
      Exception: what the library raises; a file is missing or damaged.
    """
    from tokenizers import Regex, models, normalizers

    vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if family != "CLIP":
        return _byte_level(vocab, merges)
    cleaning = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    pattern = rf"<\|startoftext\|>|<\|endoftext\|>|{_CONTRACTIONS}|{_RUNS}"
    return _clip(vocab, merges, pattern, "<|endoftext|>", normalizers.Sequence(cleaning))


def from_open_clip(content: bytes) -> tuple[str, int, int]:
    """The definition behind `bpe_simple_vocab_16e6.txt.gz`: texts have to pass `open_clip_text` first, in lower case.

    The ids are those of bytes, of bytes that end a word, of merges in their order, and of two special tokens.

    Returns:
      The definition, the id of the start token, and that of the end token.

    Raises:
      OSError, EOFError, ValueError: it is no gzip file, or its lines are no merges.
    """
    from tokenizers import Tokenizer

    lines = gzip.decompress(content).decode().split("\n")[1 : 1 + _OPEN_CLIP_MERGES]
    merges = []
    for line in filter(None, lines):
        first, second = line.split()
        merges.append((first, second))
    characters = _byte_characters()
    tokens = [*characters, *(character + _END_OF_WORD for character in characters), *map("".join, merges)]
    vocab = {token: index for index, token in enumerate([*tokens, _START, _END])}
    pattern = f"{_START}|{_END}|(?i:{_CONTRACTIONS})|{_RUNS}"
    tokenizer = Tokenizer.from_str(_clip(vocab, merges, pattern, _END, None))
    tokenizer.add_special_tokens([_START, _END])
    return tokenizer.to_str(), vocab[_START], vocab[_END]


def open_clip_text(text: str) -> str:
    """Cleans a text as open_clip's tokenizers do, but for the case of its letters: HTML entities, white space.

    open_clip cleans with the package ftfy before. What that does to sound text is done here too: straight
    quotes, full-width characters, Latin ligatures, control characters, NFC. Its repair of wrongly decoded text
    ("Ã©" for "é") and its removal of terminal colour codes are not, so such texts get other ids than in open_clip.
    """
    unescape = "<" not in text
    before = None
    while text != before:  # a replacement may bring forth another
        before = text
        if unescape:
            text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
        text = unicodedata.normalize("NFC", text.translate(_REPLACEMENTS))
    return " ".join(html.unescape(html.unescape(text)).split())


def _clip(vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str, unknown: str, normalizer) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix=_END_OF_WORD)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself where it can be printed, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = sorted(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def _replacements() -> dict[int, str | None]:
    ligatures = (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), 0x1F1, 0x1F2, 0x1F3, *range(0xFB00, 0xFB07))
    widths = (0x3000, *range(0xFF01, 0xFFF0))
    table: dict[int, str | None] = {point: unicodedata.normalize("NFKC", chr(point)) for point in (*ligatures, *widths)}
    table[0xFB05] = "\u017ft"  # NFKC would make the long s a common one
    table |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'")
    table |= dict.fromkeys(range(0x201C, 0x2020), '"')
    # Of Latin-1's second block of controls, what Windows puts there.
    table |= {point: bytes([point]).decode("cp1252", "ignore") or chr(point) for point in range(0x80, 0xA0)}
    controls = (*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
    return table | dict.fromkeys(controls)


_REPLACEMENTS = _replacements()
