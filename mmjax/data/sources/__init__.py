"""Data sources by name. A source is random access: `len(source)`, and `source[i]` is a record.

A record is a dictionary: `key`, `image` (encoded bytes), `captions` {language: [text]}, `mirror`.
A new format is a file here and a line in `open_source`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from mmjax.data import openmoji
from mmjax.data.sources.array_record import ArrayRecordSource
from mmjax.errors import UserError


class Source(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def open_source(name: str, split: str, progress: Callable[[Iterable, int], Iterable] | None = None) -> Source:
    """Opens `openmoji` (built on first use) or `array_record:PATTERN`, where `{split}` is replaced.

    Args:
      name: the source, as in a config.
      split: for openmoji "train", "test" or "all".
      progress: see `openmoji.prepare`.

    Raises:
      UserError: unknown source or split, or its files are missing.
    """
    kind, _, argument = name.partition(":")
    if kind == "array_record":
        return ArrayRecordSource(argument.replace("{split}", split))
    if name == "openmoji":
        if split not in (*openmoji.SPLITS, "all"):
            raise UserError(f'openmoji has no split "{split}"; known: {", ".join(openmoji.SPLITS)}, all')
        folder = openmoji.prepare(**({"progress": progress} if progress else {}))
        return ArrayRecordSource(str(folder / f"{'*' if split == 'all' else split}.array_record"))
    raise UserError(f'unknown source "{name}"; known: openmoji, array_record:PATTERN')


def tokenizer_path(name: str, languages: Sequence[str]) -> Path | None:
    """The tokenizer that a source comes with for these languages, or None where it has none."""
    if name == "openmoji":
        return openmoji.prepare() / openmoji.tokenizer_name(languages)
    return None
