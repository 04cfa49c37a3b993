"""Where a preparation keeps its files: a local folder, or one in an object store (`gs://`, `s3://`).

A local file is written under another name, then renamed. A store makes an object whole or not at all, has no folders
to make, and takes tens of milliseconds for whatever is asked: so many are read at a time, and listings are seldom.
"""

import fnmatch
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from mmjax.errors import UserError, one_line
from mmjax.files import write_atomically

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_CLIENTS = ("gs", "gcs", "s3")  # as fsspec calls them
_AT_ONCE = 32  # files read
_LIST_SECONDS = 10  # between two listings that only show progress

# Where TensorFlow is installed, etils would take its file systems, which take seconds to import and know no s3://.
os.environ.setdefault("EPATH_USE_TF", "false")
# A remembered listing lacks what other machines have written since.
for _client in _CLIENTS:
    fsspec.config.conf.setdefault(_client, {})["use_listings_cache"] = False


def locate(address: str | os.PathLike) -> epath.Path:
    """The folder that an address names: an absolute path, or a remote one.

    Raises:
      UserError: it is of another kind, or the package that reaches it is not installed.
    """
    address = os.fspath(address)
    scheme, is_address, name = address.partition("://")
    if not is_address:
        return epath.Path(os.path.abspath(address))
    if scheme not in _PACKAGES or not name.strip("/"):
        known = ", ".join(f"{known}://BUCKET/FOLDER" for known in _PACKAGES)
        raise UserError(f"OUT {address}: a folder of this machine, or one of {known}")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise UserError(f"OUT {address} needs one more package: pip install {_PACKAGES[scheme]}") from error
    return epath.Path(address)


def is_remote(path: epath.Path) -> bool:
    """Whether a path lies in an object store."""
    return "://" in os.fspath(path)


def make(folder: epath.Path) -> None:
    """Makes a local folder and those above it; a store has none."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(folder: epath.Path) -> None:
    """Removes a folder and what is in it, where it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with told("remove", folder):
        folder.rmtree(missing_ok=True)


def names(folder: epath.Path) -> list[str]:
    """The names of what lies in a folder, sorted; none where it is not there."""
    with told("list", folder):
        try:
            found = sorted(path.name for path in folder.iterdir())
        except FileNotFoundError:
            return []
    if is_remote(folder):  # a store's console marks an empty folder with an object of the folder's name
        found = [name for name in found if name != folder.name]
    return found


def counter(folder: epath.Path, pattern: str) -> Callable[[], int]:
    """Counts the files that a pattern matches, whenever it is called; a remote folder is listed now and then only."""
    seconds = _LIST_SECONDS if is_remote(folder) else 0
    looked, count = -float("inf"), 0

    def counted() -> int:
        nonlocal looked, count
        if time.monotonic() - looked >= seconds:
            looked = time.monotonic()
            with suppress(UserError):  # it is for show
                count = len(fnmatch.filter(names(folder), pattern))
        return count

    return counted


def size(path: epath.Path) -> int:
    """Of a file, in bytes; -1 where there is none."""
    with told("read", path):
        try:
            return path.stat().length if is_remote(path) else os.path.getsize(path)
        except FileNotFoundError:
            return -1


def read(path: epath.Path) -> bytes:
    """The bytes of a file."""
    with told("read", path):
        return path.read_bytes()


def sizes(paths: Sequence[epath.Path]) -> Iterator[int]:
    """`size` of many files."""
    return _each(size, paths)


def read_all(paths: Sequence[epath.Path]) -> Iterator[bytes]:
    """The bytes of files, in their order."""
    return _each(read, paths)


def _each(function: Callable[[epath.Path], Any], paths: Sequence[epath.Path]) -> Iterator[Any]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for begin in range(0, len(paths), _AT_ONCE):
            yield from pool.map(function, paths[begin : begin + _AT_ONCE])


def write(path: epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    if not is_remote(path):
        write_atomically(Path(path), content)
        return
    with told("write", path):
        path.write_bytes(content)


def put(file: Path, target: epath.Path) -> None:
    """Moves a finished local file to its place, or copies it there where that is remote."""
    if not is_remote(target):
        os.replace(file, target)
        return
    with told("write", target):
        epath.Path(file).copy(target, overwrite=True)


@contextmanager
def told(doing: str, path: epath.Path) -> Iterator[None]:
    """Tells what goes wrong remotely in one line.

    Raises:
      UserError: `path` is remote and something was raised.
    """
    try:
        yield
    except Exception as error:  # of the kinds that fsspec's packages raise there is no list
        if isinstance(error, UserError) or not is_remote(path):
            raise
        raise UserError(f"cannot {doing} {path}: {one_line(error)}") from error
