"""Lists of images with their texts: CSV and JSON Lines. They name image files by path."""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmjax import files
from mmjax.data.records import Fields, assemble
from mmjax.data.sources.arrow_files import convert
from mmjax.data.sources.rows import names_within, with_image_file
from mmjax.data.sources.tables import TableSource
from mmjax.errors import RecordError, UserError
from mmjax.files import Progress, silent

MAX_LINE_BYTES = 16 * 2**20
_CHUNK_BYTES = 16 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class CsvSource(TableSource):
    """The rows of CSV files, or of tab-separated ones, from copies in Arrow's format in the cache."""

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Parses the files that are not in the cache yet.

        Args:
          location: a pattern of files (`files.expand`) in UTF-8, each with a header: where that has tabs and no comma,
            tabs separate values. Quoted values may hold line
            breaks; an empty value is a missing one.
          split: not used.
          fields: the mapping.
          root: the folder of image files; "" is the folder of the list.
          progress: `progress(items, total, title)` wraps the iteration over the files to show it.

        Raises:
          UserError: a row has another number of values than the header, the cache cannot be written, or see
            `TableSource`.
        """
        lists = files.expand(location)
        super().__init__(convert(lists, "csv", _csv_batches, progress), lists, fields, root, {})
        self.fingerprint = files.fingerprint("csv", [_digest(path) for path in lists], self._fields)


class JsonLinesSource:
    """The objects of JSON Lines files, one a line; blank lines are skipped. A line is parsed when it is read."""

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Finds the lines.

        Args:
          location: a pattern of files (`files.expand`) in UTF-8.
          split: not used.
          fields: the mapping.
          root: the folder of image files; "" is the folder of the list.
          progress: `progress(items, total, title)` wraps the iteration over the files to show it.

        Raises:
          UserError: no file matches, or one cannot be read.
        """
        self._paths, self._fields = files.expand(location), fields or Fields()
        self._keys = names_within(self._paths)
        self._folders = [root or os.path.dirname(os.path.abspath(path)) for path in self._paths]
        self._lines, digests = [], []
        for path in progress(self._paths, len(self._paths), f"finding the lines of {len(self._paths):,} lists"):
            lines, digest = _find_lines(path)
            self._lines.append(lines)
            digests.append(digest)
        self._starts = [0, *np.cumsum([len(lines) for lines in self._lines]).tolist()]
        self.fingerprint = files.fingerprint("jsonl", digests, self._fields)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        file = bisect.bisect_right(self._starts, index) - 1
        start, end, number = self._lines[file][index - self._starts[file]].tolist()
        key = f"{self._keys[file]}:{number}"
        raw = _parse(self._paths[file], start, end, key)
        return assemble(with_image_file(raw, self._fields, self._folders[file], key), self._fields, key)


def _csv_batches(path: str) -> tuple[Any, Iterator]:
    """Schema and batches of a CSV file, all columns as texts; what is no UTF-8 is replaced."""
    import pyarrow as pa
    from pyarrow import csv

    with open(path, "rb") as file:
        header = file.readline(_CHUNK_BYTES)
    # open_clip writes tabs into .csv too.
    delimiter = "\t" if b"\t" in header and b"," not in header else ","
    options = {
        "read_options": csv.ReadOptions(block_size=_CHUNK_BYTES, use_threads=False),  # so errors name the row
        "parse_options": csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
    }
    names = csv.open_csv(path, **options).schema.names
    if len(set(names)) < len(names):
        raise UserError(f"{path} names a column twice; it has: {', '.join(names)[:500]}")
    conversion = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.binary()), null_values=[""], strings_can_be_null=True
    )
    schema = pa.schema([(name, pa.string()) for name in names])
    batches = csv.open_csv(path, **options, convert_options=conversion)
    return schema, (pa.record_batch(list(map(_as_text, batch.columns)), schema=schema) for batch in batches)


def _as_text(column) -> Any:
    import pyarrow as pa

    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:  # it is not all UTF-8
        values = (value if value is None else value.decode("utf-8", "replace") for value in column.to_pylist())
        return pa.array(values, pa.string())


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_lines(path: str) -> tuple[np.ndarray, str]:
    """int64 [lines, 3] with start, end and number (from 1) of each line that is not blank; and the file's SHA-256."""
    ends, filled, digest = [], [], hashlib.sha256()
    position, is_filled = 0, False  # `is_filled`: of the line that the chunk before has begun
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                characters = np.frombuffer(chunk, np.uint8)
                breaks = np.flatnonzero(characters == ord("\n"))
                visible = np.append(characters > ord(" "), False)
                has_visible = np.logical_or.reduceat(visible, np.append(0, breaks + 1))
                has_visible[0] |= is_filled
                is_filled = has_visible[-1]
                ends.append(breaks + position)
                filled.append(has_visible[:-1])
                position += len(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    all_ends = np.concatenate([*ends, [position]])
    starts = np.append(0, all_ends[:-1] + 1)
    numbers = np.flatnonzero(np.concatenate([*filled, [is_filled]]))
    return np.stack([starts[numbers], all_ends[numbers], numbers + 1], axis=1).astype(np.int64), digest.hexdigest()


def _parse(path: str, start: int, end: int, key: str) -> dict[str, Any]:
    if end - start > MAX_LINE_BYTES:
        raise RecordError(f"record {key!r}: the line has {end - start:,} bytes, more than {MAX_LINE_BYTES:,}")
    try:
        with open(path, "rb") as file:
            file.seek(start)
            line = file.read(end - start).removeprefix(_BYTE_ORDER_MARK)
        raw = json.loads(line.decode("utf-8", "replace"))
    except OSError as error:
        raise RecordError(f"record {key!r}: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"record {key!r} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RecordError(f"record {key!r} is no JSON object but {type(raw).__name__}")
    return raw
