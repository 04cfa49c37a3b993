"""Tensors in files: read through memory maps, written whole.

The format is safetensors: 8 bytes with the length of a header, the header as JSON, and the tensors' bytes. It is read
here and not by its own library, which copies every tensor to memory where it gives NumPy arrays.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from mmjax.errors import UserError
from mmjax.files import write_atomically

MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
SHARD_BYTES = 5 * 10**9
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_RANK = 32
_LFS_POINTER = b"version "  # the first bytes of what git leaves where git-lfs is not installed


class Entry(NamedTuple):
    """One tensor: its shape, its dtype as safetensors names it, and what reads it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Shaped[np.ndarray, "..."]]


class Tensors:
    """The tensors of one model, by name; their data is read when it is asked for."""

    def __init__(self, source: str, entries: Mapping[str, Entry]):
        self.source, self.entries = source, entries

    def names(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape and dtype ("F32", "BF16", ...) of each tensor; no data is read."""
        return {name: (entry.shape, entry.dtype) for name, entry in self.entries.items()}

    def get(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor as it lies in the file: memory-mapped and read-only, but for a copy where it is not aligned.

        Raises:
          UserError: there is no such tensor.
        """
        if name not in self.entries:
            raise UserError(f"{self.source} has no tensor {name!r}")
        return self.entries[name].read()


class _Place(NamedTuple):
    """Where a tensor's bytes begin and end, counted from the end of the header."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: str


def read_safetensors(path: Path, source: str) -> Tensors:
    """Opens one file.

    Args:
      path: of the file.
      source: what messages call it.

    Raises:
      UserError: it cannot be read, is truncated, or is no safetensors file with all its bytes in one tensor each.
    """
    try:
        header, start, size = _header(path, source)
        data = np.asarray(np.memmap(path, np.uint8, "r"))[start:]
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    places = _places(header, source)
    promised = start + max((place.end for place in places.values()), default=0)
    if size != promised:
        what = "is truncated" if size < promised else "is damaged"
        raise UserError(f"{source} {what}: {size:,} bytes are there, its header promises {promised:,}")
    return Tensors(source, {name: Entry(p.shape, p.dtype, _reader(data, p)) for name, p in places.items()})


def _reader(data: np.ndarray, place: _Place) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = data[place.begin : place.end].view(DTYPES[place.dtype]).reshape(place.shape)
        return array if array.flags.aligned else array.copy()

    return read


def _header(path: Path, source: str) -> tuple[Any, int, int]:
    """The header, where it ends, and the bytes of the whole file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if first == _LFS_POINTER:
            raise UserError(f"{source} is only a pointer of Git LFS: `git lfs pull` gets the file itself")
        if len(first) == 8 and length > MAX_HEADER_BYTES:
            raise UserError(f"{source} is no safetensors file: its header would have {length:,} bytes")
        if size < 8 + length:
            raise UserError(f"{source} is truncated: {size:,} bytes are there, its header alone takes {8 + length:,}")
        text = file.read(length)
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates), 8 + length, size
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is no safetensors file: its header is no JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.200} is there twice")
        found[name] = value
    return found


def _places(header: Any, source: str) -> dict[str, _Place]:
    """The tensors in the order of their bytes, which follow each other without gap or overlap."""
    if not isinstance(header, dict):
        raise UserError(f"{source} is no safetensors file: its header is no JSON object")
    places, expected = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            places[name] = _place(entry)
        except ValueError as error:
            raise UserError(f"{source} is damaged: tensor {name!r:.200}: {error}") from error
    places = dict(sorted(places.items(), key=lambda item: item[1][:2]))
    for name, place in places.items():
        if place.begin != expected:
            what = "overlaps the one before" if place.begin < expected else "leaves a gap"
            where = f"it begins at byte {place.begin} and not at {expected}"
            raise UserError(f"{source} is damaged: tensor {name!r:.200} {what}: {where}")
        expected = place.end
    return places


def _place(entry: Any) -> _Place:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            pass
        case _:
            raise ValueError("its entry has not a dtype, a shape and two data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"its dtype is {dtype!r:.200}, not one of {', '.join(DTYPES)}")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise ValueError("its shape and data_offsets have to be whole numbers from 0 on")
    itemsize = DTYPES[dtype].itemsize
    # NumPy takes no shape whose other dimensions are as large, even where one of them is 0.
    if len(shape) > _MAX_RANK or math.prod(max(1, number) for number in shape) * itemsize >= 2**63:
        raise ValueError("its shape is too large")
    if end - begin != math.prod(shape) * itemsize:
        raise ValueError(f"its shape takes {math.prod(shape) * itemsize} bytes, its data_offsets {end - begin}")
    return _Place(begin, end, tuple(shape), dtype)


def read_sharded(folder: Path, index: Mapping[str, Any], source: str) -> Tensors:
    """Opens the files that an index names.

    Args:
      folder: where they lie.
      index: {"weight_map": {tensor: file}, "metadata": {"total_size": bytes of all tensors}}.
      source: what messages call the index.

    Raises:
      UserError: the index is damaged, a file is missing or damaged, or does not hold what the index says.
    """
    files, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(files, dict) or not files or not isinstance(metadata, dict):
        raise UserError(f"{source} is damaged: it has no weight_map")
    shards = {}
    for file in sorted({str(file) for file in files.values()}):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{source} is damaged: its weight_map names {file!r}, which is no safetensors file beside it"
            )
        if not (folder / file).is_file():
            raise UserError(f"{source} names {file}, which is not there")
        shards[file] = read_safetensors(folder / file, f"{source}: {file}").entries
    for name, file in files.items():
        if name not in shards[str(file)]:
            raise UserError(f"{source} says that {file} has the tensor {name!r}, and it has not")
    entries = {name: shards[file][name] for name, file in files.items()}
    there = sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in entries.values())
    if metadata.get("total_size", there) != there:
        raise UserError(f"{source} promises {metadata['total_size']} bytes of tensors, and its files hold {there}")
    return Tensors(source, entries)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Shaped[np.ndarray, "..."]] | Iterable[tuple[str, Shaped[np.ndarray, "..."]]],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a safetensors file whole or not at all, or several and their index as `transformers` writes them.

    Args:
      path: `FOLDER/model.safetensors`. What does not fit into one file goes to `model-00001-of-00003.safetensors`, ...
        and `model.safetensors.index.json`.
      tensors: by name. Pairs may be made one by one: never more than one file's are in memory.
      metadata: goes into the header. Without "format": "pt" `transformers` does not read the file.
      max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.

    Raises:
      UserError: another number of files is there from before, and would be read in place of these.
      TypeError: a dtype that the format has not.
      ValueError: a name is there twice.
    """
    index_path = path.with_name(f"{path.name}.index.json")
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    written: list[Path] = []
    sizes: list[dict[str, tuple[int, int]]] = []  # of each file: the bytes and elements of each tensor
    with ExitStack() as stack:
        for group in _groups(pairs, max_shard_bytes):
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            stack.callback(temporary.unlink, missing_ok=True)
            _write(temporary, group, metadata)
            written.append(temporary)
            sizes.append({name: (array.nbytes, array.size) for name, array in group.items()})
            group.clear()  # before the next file's are made
        stale = path if len(written) > 1 else index_path
        if stale.exists():
            raise UserError(f"{stale} is there from another model: remove it first")
        names = [path.name]
        if len(written) > 1:
            names = [f"{path.stem}-{i:05d}-of-{len(written):05d}{path.suffix}" for i in range(1, len(written) + 1)]
        for temporary, name in zip(written, names, strict=True):
            os.replace(temporary, path.with_name(name))
    if len(written) > 1:
        write_atomically(index_path, _index(names, sizes))


def _index(names: list[str], sizes: list[dict[str, tuple[int, int]]]) -> bytes:
    total, elements = (sum(size[i] for group in sizes for size in group.values()) for i in (0, 1))
    content = {
        "metadata": {"total_parameters": elements, "total_size": total},
        "weight_map": {name: file for file, group in zip(names, sizes, strict=True) for name in group},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _groups(pairs: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each file; there is at least one."""
    group: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    total = 0
    for name, value in pairs:
        array = np.asarray(value)
        if name in seen:
            raise ValueError(f"the tensor {name!r} is there twice")
        seen.add(name)
        if group and total + array.nbytes > limit:
            yield group
            group, total = {}, 0
        group[name] = array
        total += array.nbytes
    yield group


def _write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    # The widest first, after a header of a multiple of 8 bytes: each tensor lies aligned.
    arrays = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, array in arrays.items():
        dtype = _NAMES.get(array.dtype.newbyteorder("<"))
        if dtype is None:
            raise TypeError(f"the tensor {name!r} is {array.dtype}, which safetensors has not")
        header[name] = {"dtype": dtype, "shape": [*array.shape], "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
            file.write(little.reshape(-1).view(np.uint8))
