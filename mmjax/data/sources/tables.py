"""Tables: Arrow files, Hugging Face's saved data sets, and Parquet files.

Every row is read through a memory map of an Arrow IPC file, so it costs the bytes of that row, and processes share the
pages. Parquet can only be read by whole row groups: its files are converted once, in the cache.
"""

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import files
from mmjax.data.records import Fields, assemble
from mmjax.data.sources.arrow_files import convert, read_arrow
from mmjax.data.sources.rows import check_columns, names_within, with_image_file
from mmjax.errors import RecordError, UserError, one_line
from mmjax.files import Progress, silent

# What is read of a Parquet file at once: these bound the memory.
_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20


class TableSource:
    """Records from the rows of Arrow IPC files; the name of a class is one more field, "<column>_name"."""

    _order: np.ndarray | None = None  # row numbers, where the records are not all rows in their order

    def __init__(
        self, paths: Sequence[str], originals: Sequence[str], fields: Fields | None, root: str, features: Mapping
    ):
        """Maps the files.

        Args:
          paths: the Arrow files.
          originals: in step with them, the files that the user knows: keys and messages name these.
          fields: the mapping.
          root: the folder of image files; "" is the folder of each original.
          features: Hugging Face's description of the columns; an empty one is looked up in the first file.

        Raises:
          UserError: a file is damaged, the files' columns differ, or a mapped column is missing.
        """
        self._paths, self._fields = list(paths), fields or Fields()
        self._folders = [root or os.path.dirname(os.path.abspath(path)) for path in originals]
        self._keys = names_within(originals)
        opened = [read_arrow(path) for path in self._paths]
        schemas = [schema for schema, _ in opened]
        for schema, path in zip(schemas, originals, strict=True):
            if not schema.equals(schemas[0]):
                raise UserError(f"{path} has other columns than {originals[0]}: read them as two sources")
        self._classes = _class_names(features or _features(schemas[0]))
        check_columns([*schemas[0].names, *(f"{name}_name" for name in self._classes)], self._fields, originals[0])
        self._batches: list | None = [batch for _, batches in opened for batch in batches]
        self._file_starts = np.cumsum([0, *(sum(map(len, batches)) for _, batches in opened)])
        self._batch_starts = np.cumsum([0, *map(len, self._batches)])

    def __len__(self) -> int:
        return int(self._file_starts[-1]) if self._order is None else len(self._order)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        row = index if self._order is None else int(self._order[index])
        file = int(np.searchsorted(self._file_starts, row, "right")) - 1
        key = f"{self._keys[file]}:{row - self._file_starts[file]}"
        raw = self._read_row(row, key)
        for column, names in self._classes.items():
            number = raw.get(column)
            raw[f"{column}_name"] = names[number] if isinstance(number, int) and 0 <= number < len(names) else ""
        return assemble(with_image_file(raw, self._fields, self._folders[file], key), self._fields, key)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_batches": None}

    def _read_row(self, row: int, key: str) -> dict[str, Any]:
        try:
            batches = self._batches
            if batches is None:
                batches = self._batches = [batch for path in self._paths for batch in read_arrow(path)[1]]
            number = int(np.searchsorted(self._batch_starts, row, "right")) - 1
            values = batches[number].slice(row - self._batch_starts[number], 1)
            values.validate(full=True)  # a damaged file's offsets lead anywhere in memory
            return values.to_pylist()[0]
        except Exception as error:  # whatever pyarrow makes of damaged bytes
            raise RecordError(f"record {key!r}: {one_line(error)}") from error


class ArrowSource(TableSource):
    """The rows of Arrow IPC files, or of a folder that `save_to_disk` of Hugging Face's `datasets` wrote."""

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Maps the files.

        Args:
          location: a folder with `state.json`, one with `dataset_dict.json`, or a pattern of files (`files.expand`)
            in the stream or the file format. Compressed ones take their size in memory.
          split: which part of a folder with `dataset_dict.json`.
          fields: the mapping.
          root: the folder of image files; "" is the folder of the Arrow files.
          progress: not used.

        Raises:
          UserError: see `TableSource`; or the folder is not as `save_to_disk` writes it, or has no such split.
        """
        features, indices, state = {}, [], {}
        if os.path.isdir(location):
            folder = _split_folder(location, split)
            state = _read_json(os.path.join(folder, "state.json"))
            paths = _listed(folder, state, "_data_files")
            # The one name is older releases' of `datasets`; newer ones save rows in their final order.
            indices = _listed(folder, state, "_indices_data_files") or _listed(folder, state, "_indices_files")
            information = os.path.join(folder, "dataset_info.json")
            features = _read_json(information).get("features") if os.path.exists(information) else {}
            if not paths:
                raise UserError(f"{folder}/state.json lists no data files")
        else:
            paths = files.expand(location)
        super().__init__(paths, paths, fields, root, features)
        if indices:
            self._order = _row_order(indices, len(self))
        sizes = files.names_and_sizes([*paths, *indices])
        self.fingerprint = files.fingerprint("arrow", sizes, state.get("_fingerprint"), self._fields)


class ParquetSource(TableSource):
    """The rows of Parquet files, from copies in Arrow's format in the cache, made on first use."""

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Converts the files that are not in the cache yet.

        Args:
          location: a pattern of files (`files.expand`), or a folder: all `*.parquet` in it, or in its folder "data" as
            in repositories of Hugging Face; those called "SPLIT-..." where there are such.
          split: see `location`.
          fields: the mapping.
          root: the folder of image files; "" is the folder of the Parquet files.
          progress: `progress(items, total, title)` wraps the iteration over the files to show it.

        Raises:
          UserError: the cache cannot be written, or see `TableSource`.
        """
        originals = _parquet_files(location, split) if os.path.isdir(location) else files.expand(location)
        paths = convert(originals, "parquet", _parquet_batches, progress)
        super().__init__(paths, originals, fields, root, {})
        self.fingerprint = files.fingerprint("parquet", files.names_and_sizes(originals), self._fields)


def _parquet_files(folder: str, split: str) -> list[str]:
    for below in (folder, os.path.join(folder, "data")):
        start = glob.escape(os.path.join(below, ""))
        found = sorted(glob.glob(f"{start}*.parquet"))
        of_split = [path for path in found if split and os.path.basename(path).startswith(f"{split}-")]
        if found:
            return of_split or found
    saved = any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))
    hint = f"; it was written by save_to_disk: use arrow:{folder}" if saved else ""
    raise UserError(f"no *.parquet in {folder}, nor in {os.path.join(folder, 'data')}{hint}")


def _parquet_batches(path: str) -> tuple[Any, Iterator]:
    from pyarrow.parquet import ParquetFile

    # With its defaults pyarrow comes to hold the whole file.
    file = ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    groups = ([number] for number in range(file.num_row_groups))
    return file.schema_arrow, (batch for group in groups for batch in file.iter_batches(_BATCH_ROWS, group))


def _split_folder(location: str, split: str) -> str:
    if not os.path.exists(os.path.join(location, "dataset_dict.json")):
        return location
    splits = _read_json(os.path.join(location, "dataset_dict.json")).get("splits")
    if not isinstance(splits, list) or split not in splits:
        known = ", ".join(map(str, splits)) if isinstance(splits, list) else "none"
        raise UserError(f'{location} has no split "{split}"; known: {known}')
    return os.path.join(location, split)


def _listed(folder: str, state: Mapping, name: str) -> list[str]:
    """The files in a list of `state.json`; they have to lie in the folder."""
    try:
        names = [entry["filename"] for entry in state.get(name) or []]
        if all(os.path.basename(name) == name for name in names):
            return [os.path.join(folder, name) for name in names]
    except (TypeError, KeyError):
        pass
    raise UserError(f"{folder}/state.json is not as save_to_disk writes it: {name}")


def _read_json(path: str) -> dict:
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; without it, name Arrow files by a pattern such as DIR/*.arrow"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content


def _row_order(paths: Sequence[str], rows: int) -> np.ndarray:
    """The row numbers in files with a column `indices`, which shuffling and selecting leave beside the data."""
    batches = [batch for path in paths for batch in read_arrow(path)[1]]
    try:
        order = np.concatenate([batch.column("indices").to_numpy(zero_copy_only=False) for batch in batches])
    except (KeyError, ValueError) as error:
        raise UserError(f"{paths[0]} is no list of row numbers: {one_line(error)}") from error
    if order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= rows:
        raise UserError(f"{paths[0]} names rows beyond the {rows:,} that are there")
    return order


def _features(schema) -> Mapping:
    """What `datasets` writes into the metadata of a schema, in Parquet files of its hub too."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _class_names(features: Any) -> dict[str, list[str]]:
    described = features.items() if isinstance(features, Mapping) else ()
    return {
        column: [str(name) for name in feature["names"]]
        for column, feature in described
        if isinstance(feature, Mapping)
        and feature.get("_type") == "ClassLabel"
        and isinstance(feature.get("names"), list)
    }
