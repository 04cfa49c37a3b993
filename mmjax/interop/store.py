"""Where pretrained files come from, and how tensors are read and written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.errors import UserError
from mmjax.files import write_atomically

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "U8": "u1"}


class Folder:
    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read_json(self, name: str, optional: bool = False) -> dict[str, Any]:
        if optional and not self.has(name):
            return {}
        try:
            return json.loads((self.path / name).read_text())
        except OSError as error:
            raise UserError(f"{self.name} has no {name}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{self.name}: {name} is damaged: {error}") from error


def find(source: str | Path, revision: str | None = None, allow_pickle: bool = False) -> Folder:
    if not Path(source).is_dir():
        raise UserError(f"there is no {source}")
    return Folder(Path(source), str(source))


class Tensors:
    def __init__(self, path: Path):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._header, self._start, self._path = header, 8 + length, path

    def names(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in self._header.items()}

    def get(self, name: str) -> np.ndarray:
        entry = self._header[name]
        start, end = entry["data_offsets"]
        raw = np.memmap(self._path, np.uint8, "r", self._start + start, (end - start,))
        return raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def open_tensors(folder: Folder, allow_pickle: bool = False) -> Tensors:
    names = ("model.safetensors", "open_clip_model.safetensors")
    return Tensors(next(folder.path / name for name in names if folder.has(name)))


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, parts, place = {"__metadata__": {"format": "pt"}}, [], 0
    for name, value in sorted(tensors.items()):
        parts.append(value.tobytes())
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [place, place + len(parts[-1])]}
        place += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, len(text).to_bytes(8, "little") + text + b"".join(parts))


def write_checksums(folder: Path) -> None:
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.iterdir())]
    write_atomically(folder / "SHA256SUMS", "".join(lines).encode())
