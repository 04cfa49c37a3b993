"""Data sources by name. A source is random access: `len(source)`, and `source[i]` is a record (`mmjax.data.records`).

A new format is a file here and a line in `SOURCES`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mmjax.data import openmoji as embedded
from mmjax.data.records import Fields
from mmjax.data.sources.array_record import ArrayRecordSource
from mmjax.data.sources.folder import FolderSource
from mmjax.data.sources.lists import CsvSource, JsonLinesSource
from mmjax.data.sources.openmoji import OpenMojiSource
from mmjax.data.sources.tables import ArrowSource, ParquetSource
from mmjax.data.sources.tfds import TfdsSource
from mmjax.data.sources.webdataset import WebDatasetSource
from mmjax.errors import UserError
from mmjax.files import Progress, silent

SOURCES = {
    "openmoji": OpenMojiSource,
    "array_record": ArrayRecordSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
    "arrow": ArrowSource,
    "jsonl": JsonLinesSource,
    "csv": CsvSource,
    "folder": FolderSource,
    "tfds": TfdsSource,
}


class Source(Protocol):
    """Random access to records. It can be pickled: loader processes open it again."""

    fingerprint: str  # changes when the data does, and is the same on every host

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """A record.

        Raises:
          RecordError: this one cannot be read; others may.
        """
        ...


def open_source(
    name: str, split: str = "", fields: Fields | None = None, root: str = "", progress: Progress = silent
) -> Source:
    """Opens a source.

    Args:
      name: KIND or KIND:LOCATION, as in a config; `{split}` in the location is replaced.
      split: which part of the data set, for kinds that have parts.
      fields: which fields make up a record.
      root: the folder that files named in the data must lie in.
      progress: shows what takes long.

    Raises:
      UserError: an unknown kind or split, or its files are missing or damaged, or it is empty.
    """
    kind, _, location = name.partition(":")
    if kind not in SOURCES:
        raise UserError(f'unknown source "{name}"; known: {", ".join(SOURCES)}, written KIND:LOCATION')
    if kind != "openmoji" and not location:
        raise UserError(f'source "{name}" names no location; write {kind}:LOCATION')
    source = SOURCES[kind](location.replace("{split}", split), split, fields or Fields(), root, progress)
    if not len(source):
        raise UserError(f'source "{name}" holds no record')
    return source


def open_entry(entry: Mapping, progress: Progress = silent, images: bool = True) -> Source:
    """Opens the source of a config's entry: its `source`, `split`, `fields` and `root`.

    Without `images`, those that lie in files of their own, or in tar files, are not read.

    Raises:
      UserError: see `open_source`.
    """
    image = entry["fields"]["image"] if images else None
    fields = Fields(image, tuple(entry["fields"]["captions"]), entry["fields"]["label"])
    return open_source(entry["source"], entry["split"], fields, entry["root"], progress)


def open_stream(entry: Mapping, progress: Progress = silent) -> dict[str, Source]:
    """Opens the sources of a stream by name: those of its mixture, or its single one.

    Raises:
      UserError: see `open_source`.
    """
    parts = entry["mixture"] or {"": entry}
    images = "image" in entry["inputs"]
    return {name: open_entry(part, progress, images) for name, part in parts.items()}


def tokenizer_path(name: str, groups: Sequence[str]) -> Path | None:
    """The tokenizer that a source comes with for these caption groups, or None where it has none."""
    kind, _, languages = name.partition(":")
    if kind == "openmoji":
        return embedded.prepare() / embedded.tokenizer_name(groups or languages.split(","))
    return None
