"""WebDataset: tar shards in which consecutive members with the same key are one record."""

import bisect
import errno
import functools
import io
import json
import os
from collections.abc import Iterable
from typing import Any

from mmjax import files
from mmjax.data import records
from mmjax.data.records import Fields
from mmjax.data.sources import tar_index
from mmjax.data.sources.tar_index import Shard
from mmjax.errors import RecordError, UserError
from mmjax.files import Progress, silent

_MAX_TEXT_BYTES = 16 * 2**20  # of one text or JSON member
_OPEN_FILES = 256


class WebDatasetSource:
    """Random access to the records of plain tar files, as img2dataset and the webdataset library write them.

    A member's key is its path up to the first dot of its base name; the rest, in lower case, is its field:
    "a/0001.jpg" and "a/0001.txt" are the fields "jpg" and "txt" of the record "a/0001". What a ".json" member holds
    are fields too ("caption", or "json.caption"), except where a member is called so. The tar files are never
    unpacked: an index of their members is made once and kept in the cache (`mmjax.data.sources.tar_index`).
    """

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Opens the shards.

        Args:
          location: the tar files, as `files.expand` reads it.
          split: not used; `location` names the shards of the split.
          fields: which members or JSON fields make up a record.
          root: not used; images lie in the tar files.
          progress: shows the indexing.

        Raises:
          UserError: no file is there, one is no intact plain tar file, or all together hold no record.
        """
        paths = files.expand(location)
        self._shards = [tar_index.shard(path) for path in paths]
        self._fields = fields = fields or Fields()
        self.fingerprint = files.fingerprint("webdataset", files.names_and_sizes(paths), fields)
        self._index = tar_index.open_index(self._shards, progress)
        self._first_records = self._index.records.tolist()
        if not len(self):
            raise UserError(f"{location!r} holds no record: no member has a name such as 0001.jpg")
        extensions = self._index.extensions.tobytes().decode("utf-8", "surrogateescape")
        self._extensions = extensions.lower().split("/")
        self._texts = {*records.CAPTION_FIELDS, *records.LABEL_FIELDS, *fields.captions, fields.label}

    def __len__(self) -> int:
        return self._first_records[-1]

    def __getitem__(self, index: int) -> dict:
        """A record (`mmjax.data.records`); its key is the tar key with its folders.

        Raises:
          RecordError: it cannot be read, its JSON is broken, or a mapped field is missing.
        """
        index = range(len(self))[index]
        shard = self._shards[bisect.bisect_right(self._first_records, index) - 1]
        key = self._index.key(index)
        raw, inside_json = {}, {}
        for extension, offset, size in self._members(index):
            read = functools.partial(_read, shard, key, extension, offset, size)
            if extension.rpartition(".")[2] == "json":
                raw[extension] = _parse(read(_MAX_TEXT_BYTES), shard, key)
                inside_json |= raw[extension]
            else:
                raw[extension] = read(_MAX_TEXT_BYTES) if extension in self._texts else read
        # JSON holds no image; what it calls "image" or "path" is where the image came from.
        others = {name: value for name, value in inside_json.items() if name not in records.IMAGE_FIELDS}
        return records.assemble(others | raw, self._fields, key)

    def _members(self, index: int) -> Iterable[tuple[str, int, int]]:
        """(extension, offset, size) of a record's members; of several with one extension, the last."""
        start, end = self._index.members[index : index + 2].tolist()
        extensions = [self._extensions[number] for number in self._index.extension_ids[start:end].tolist()]
        offsets, sizes = (array[start:end].tolist() for array in (self._index.offsets, self._index.sizes))
        return {member[0]: member for member in zip(extensions, offsets, sizes, strict=True)}.values()


def _read(shard: Shard, key: str, extension: str, offset: int, size: int, limit: int = files.MAX_FILE_BYTES) -> bytes:
    if size > limit:
        raise RecordError(f"record {key!r} of {shard.path}: {extension!r} has {size:,} bytes, more than {limit:,}")
    try:
        file = _open(shard)  # a name of its own: another thread may drop it from the cache, which must not close it yet
        data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise RecordError(f"record {key!r} of {shard.path}: {error.strerror}") from error
    if len(data) < size:
        raise RecordError(f"record {key!r} of {shard.path}: {extension!r} is cut short; the file has shrunk")
    return data


def _open(shard: Shard) -> io.FileIO:
    try:
        return _opened(shard)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        # Which records can be read must not depend on how many files the process happens to have open.
        _opened.cache_clear()
        return _opened(shard)


@functools.lru_cache(_OPEN_FILES)
def _opened(shard: Shard) -> io.FileIO:
    # An evicted file is closed when its last reader drops it, so threads can share the cache.
    return open(shard.path, "rb", buffering=0)


def _parse(data: bytes, shard: Shard, key: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"record {key!r} of {shard.path}: malformed JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecordError(f"record {key!r} of {shard.path}: its JSON is no object but {type(content).__name__}")
    return content
