"""Where the members of tar files lie: a reader of tar headers, and an index of many shards that is kept in the cache.

The formats are those of POSIX ("pax", section "ustar Interchange Format" and "pax Interchange Format") and of GNU tar
(its manual's "Basic Tar Format").
"""

import io
import os
import re
import stat
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmjax import files
from mmjax.errors import UserError

_LAYOUT = 1  # of the cached file
_THREADS = 16
_BLOCK = 512
_WINDOW = 4096  # bytes of one read: the headers behind small members come along
_MAX_EXTENDED = 2**20  # bytes of a long name or of a pax header
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_REGULAR, _WITHOUT_DATA, _EXTENDED = b"0\x007", b"123456", b"xXgLK"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class Shard(NamedTuple):
    """A tar file as it was when it was indexed."""

    path: str  # absolute
    size: int  # bytes
    modified: int  # nanoseconds since 1970


@dataclass(frozen=True)
class TarIndex:
    """The records of a list of shards. A record is a run of members with the same key."""

    records: np.ndarray  # int64 [shards + 1]: the first record of each shard
    members: np.ndarray  # int64 [records + 1]: the first member of each record
    key_starts: np.ndarray  # int64 [records + 1]
    keys: np.ndarray  # uint8: all keys, one after the other
    offsets: np.ndarray  # int64 [members]: of the data in its shard
    sizes: np.ndarray  # int64 [members]
    extension_ids: np.ndarray  # int32 [members]
    extensions: np.ndarray  # uint8: the extensions with "/" between them, which none contains

    def key(self, record: int) -> str:
        start, end = self.key_starts[record : record + 2].tolist()
        return self.keys[start:end].tobytes().decode("utf-8", "surrogateescape")


def shard(path: str) -> Shard:
    """Raises UserError where there is no regular file (a named pipe would block)."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file; name tar files")
    return Shard(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def open_index(shards: Sequence[Shard], progress: Callable) -> TarIndex:
    """The index of these shards, from the cache where they have not changed since.

    A cache that cannot be written is done without.

    Args:
      shards: the files, in order.
      progress: (items, total, title) -> the items, shown while they are worked on.

    Raises:
      UserError: a shard is no tar file, is damaged, compressed or cut short; the message names it and the place.
    """
    path = files.cache_root() / "tar-index" / f"{files.fingerprint(_LAYOUT, [tuple(shard) for shard in shards])}.npz"
    index = _load(path)
    if index is None:
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = pool.map(_scan, [shard.path for shard in shards])
            index = _join(list(progress(parts, len(shards), "indexing tar shards")))
        _save(path, index)
    return index


def read_members(path: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, offset of the data, size) of each regular file in a tar file.

    Directories, links, devices and sparse files are passed over. The archive may lack its end blocks.

    Raises:
      UserError: as `open_index` says.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            yield from _walk(path, file.fileno())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _walk(path: str, descriptor: int) -> Iterator[tuple[bytes, int, int]]:
    end = os.fstat(descriptor).st_size
    read = _reader(descriptor)
    if read(0, 6).startswith(_COMPRESSED):
        raise UserError(f"{path} is compressed; random access needs plain tar files: decompress it")
    if not end:
        raise UserError(f"{path} is empty; copy or write the shard again")
    offset, everywhere, here = 0, {}, {}
    while (block := read(offset, _BLOCK)).strip(b"\0"):  # zeros, or the file's end, end the archive
        try:
            kind, name, size = _parse(block)
            start = offset + _BLOCK
            if kind in _EXTENDED:
                found = _extended(kind, size, read(start, min(size, _MAX_EXTENDED)))
                (everywhere if kind == ord("g") else here).update(found)
            else:
                pax = everywhere | here if everywhere or here else {}
                size, name, here = _decimal(pax.get("size"), size), pax.get("path") or name, {}
                start = _after_sparse_map(read, start, block) if kind == ord("S") else start
        except ValueError as error:
            raise UserError(f"{path} is no tar file, or is damaged: {error} at byte {offset:,}") from None
        offset = start + (0 if kind in _WITHOUT_DATA else -(-size // _BLOCK) * _BLOCK)
        if offset > end:
            raise UserError(f"{path} ends inside the member at byte {start - _BLOCK:,}: copy or write the shard again")
        if kind in _REGULAR and "sparse" not in pax:
            yield name, start, size


def _reader(descriptor: int) -> Callable[[int, int], bytes]:
    """A function (offset, count) -> bytes that reads a window at a time."""
    window, start = b"", 0

    def read(offset: int, count: int) -> bytes:
        nonlocal window, start
        if not start <= offset <= start + len(window) - count:
            window, start = os.pread(descriptor, max(count, _WINDOW), offset), offset
        return window[offset - start : offset - start + count]

    return read


def _parse(block: bytes) -> tuple[int, bytes, int]:
    """A header block's type, name and size. Raises ValueError where it is none."""
    if len(block) < _BLOCK:
        raise ValueError("a header is cut short")
    # The checksum adds up all bytes, with spaces in its own place. Adler-32's lower half is such a sum, modulo 65521,
    # and five times as fast as adding in Python.
    total = zlib.adler32(block[156:], zlib.adler32(block[:148], 8 * ord(" "))) & 0xFFFF
    if total != _number(block[148:156]) % 65521:
        raise ValueError("wrong checksum")
    size = _number(block[124:136])
    if size < 0:
        raise ValueError("negative size")
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":  # GNU tar keeps other things there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return block[156], name, size


def _number(field: bytes) -> int:
    """Octal digits; or, after a byte of 128 or 255, a number of base 256 as GNU tar writes large and negative ones."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise ValueError("a header whose number is none") from None


def _decimal(field: bytes | None, otherwise: int) -> int:
    if not field:
        return otherwise
    if not (field.isdigit() and len(field) <= 19):
        raise ValueError("a pax header whose size is no number")
    return int(field)


def _extended(kind: int, size: int, content: bytes) -> dict[str, bytes]:
    """What a GNU long name or a pax header says about the next member: of "path", "size" and "sparse", those there."""
    if size > _MAX_EXTENDED:
        raise ValueError(f"a long name or pax header of over {_MAX_EXTENDED:,} bytes")
    if kind == ord("K"):  # where a link leads
        return {}
    if kind == ord("L"):
        return {"path": content.partition(b"\0")[0]}
    found, at = {}, 0
    while at < len(content) and content[at]:
        match = _PAX_RECORD.match(content, at)
        stop = at + int(match[1]) if match else 0
        if not match or not match.end() < stop <= len(content) or content[stop - 1] != ord("\n"):
            raise ValueError("a malformed pax header")
        if match[2] in (b"path", b"size"):
            found[match[2].decode()] = content[match.end() : stop - 1].partition(b"\0")[0]
        elif match[2].startswith(b"GNU.sparse."):
            found["sparse"] = b"yes"
        at = stop
    return found


def _after_sparse_map(read: Callable[[int, int], bytes], start: int, block: bytes) -> int:
    """Where the data of an old GNU sparse file starts: its map may go on for blocks behind the header."""
    more = block[482]
    while more:
        block = read(start, _BLOCK)
        if len(block) < _BLOCK:
            raise ValueError("a sparse file's map is cut short")
        start, more = start + _BLOCK, block[504]
    return start


def _scan(path: str) -> dict[str, np.ndarray]:
    """One shard's part of the index: as `TarIndex` has it, but counts and lengths instead of starts."""
    keys, key_lengths, counts = bytearray(), array("q"), array("q")
    offsets, sizes, extension_ids, extensions = array("q"), array("q"), array("i"), {}
    last = None
    for name, offset, size in read_members(path):
        folder, slash, base = name.rpartition(b"/")
        stem, _, extension = base.partition(b".")
        if not stem or not extension:  # hidden files, and notes such as README
            continue
        key = folder + slash + stem
        if key != last:
            keys += key
            key_lengths.append(len(key))
            counts.append(0)
            last = key
        counts[-1] += 1
        offsets.append(offset)
        sizes.append(size)
        extension_ids.append(extensions.setdefault(extension.lower(), len(extensions)))
    part = {"counts": counts, "key_lengths": key_lengths, "offsets": offsets, "sizes": sizes}
    part = {name: np.array(values, np.int64) for name, values in part.items()}
    return part | {"keys": np.array(keys), "ids": np.array(extension_ids, np.int32), "extensions": list(extensions)}


def _join(parts: Sequence[dict]) -> TarIndex:
    numbers = {extension: i for i, extension in enumerate(sorted({e for part in parts for e in part["extensions"]}))}
    for part in parts:
        part["ids"] = np.array([numbers[e] for e in part["extensions"]], np.int32)[part["ids"]]

    def all_of(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    def starts(lengths: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    return TarIndex(
        records=starts(np.array([len(part["counts"]) for part in parts])),
        members=starts(all_of("counts")),
        key_starts=starts(all_of("key_lengths")),
        keys=all_of("keys"),
        offsets=all_of("offsets"),
        sizes=all_of("sizes"),
        extension_ids=all_of("ids"),
        extensions=np.frombuffer(b"/".join(numbers), np.uint8),
    )


def _load(path: Path) -> TarIndex | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return TarIndex(**arrays)
    except Exception:  # zipfile and NumPy have a dozen ways to say that a file is missing or damaged
        return None


def _save(path: Path, index: TarIndex) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **vars(index))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, buffer.getvalue())
    except OSError:
        pass
