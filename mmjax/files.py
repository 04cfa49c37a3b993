"""Files: finding them, reading them within limits, writing them whole."""

import errno
import functools
import glob
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmjax.errors import RecordError, UserError, one_line

# `progress(items, total, title)` wraps an iteration over `items` to show how far it is.
Progress = Callable[[Iterable, int, str], Iterable]

MAX_FILE_BYTES = 256 * 2**20  # of one image or one caption file
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_EXPANSION = 10_000_000


def silent(items: Iterable, total: int, title: str) -> Iterable:
    """A `Progress` that shows nothing."""
    return items


def cache_root() -> Path:
    """The folder of prepared data and compiled programs: `MMJAX_CACHE`, or `~/.cache/mmjax`."""
    return Path(os.environ.get("MMJAX_CACHE") or Path.home() / ".cache" / "mmjax")


def cache_folder(*names: str) -> Path:
    """A folder in the cache, made where it is not there yet.

    Raises:
      UserError: it cannot be written.
    """
    folder = cache_root().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {folder}: {error.strerror}; set MMJAX_CACHE to a folder of yours"
        ) from error
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name to write to; it becomes `path` at the end, or vanishes where an exception comes out.

    Other processes, on other hosts too, may do the same at the same time: each has a name of its own.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; the folder has to exist."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def expand(pattern: str) -> list[str]:
    """The local files that a pattern names, in order.

    Args:
      pattern: a path with `*`, `?`, `[]`, and braces as shells have them: `{00000..00031}` counts, `{a,b}` lists.
        Several patterns are joined with `::`. A remote address (`gs://`, `s3://`, `https://`, ...) is read with
        fsspec, and its files are copied into the cache.

    Returns:
      What braces list in their order, what `*` finds sorted; a file that is named twice is there twice.

    Raises:
      UserError: nothing is there.
    """
    found = []
    for part in pattern.split("::"):
        for name in _expand_braces(part):
            matches = _remote(name) if "://" in name else _local(name)
            if not matches:
                raise UserError(f"no data at {name!r}: no such file, or the pattern matches none")
            found.extend(matches)
    return found


def _local(name: str) -> list[str]:
    name = os.path.expanduser(name)
    return [name] if os.path.exists(name) else sorted(glob.glob(name))


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits that change when any of the parts does; their `repr` decides."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def names_and_sizes(paths: Sequence[str]) -> list[tuple[str, int]]:
    """What tells one data set's files from another's, wherever they lie: their names and bytes."""
    return [(os.path.basename(path), os.path.getsize(path)) for path in paths]


def path_inside(root: str, name: str) -> str:
    """The real path of the file `name`, a path relative to `root` or absolute, of a list that may be hostile.

    Raises:
      RecordError: it leads out of `root`, or is no path.
    """
    try:
        real_root = _real(root)
        path = os.path.realpath(os.path.join(real_root, name))
        is_inside = os.path.commonpath([real_root, path]) == real_root
    except ValueError as error:
        raise RecordError(f"{name!r} is no path") from error  # it holds a NUL character
    if not is_inside:
        raise RecordError(f"{name!r} leads out of {root}; set `root` to a folder that it lies in")
    return path


def read_inside(root: str, name: str, limit: int | None = None) -> bytes:
    """Reads the file `name`: see `path_inside`.

    Raises:
      RecordError: it is missing, leads out of `root`, is no regular file, or has more bytes than `limit`, which by
        default is MAX_FILE_BYTES.
    """
    limit = MAX_FILE_BYTES if limit is None else limit
    try:
        path = path_inside(root, name)
        # Not blocking: a named pipe without a writer would hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RecordError(f"{path} is no regular file")
            if status.st_size > limit:
                raise RecordError(f"{path} has {status.st_size:,} bytes, more than {limit:,}")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(limit)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RecordError(f"cannot read {name!r} in {root}: {error.strerror}") from error


@functools.lru_cache(maxsize=1024)
def _real(root: str) -> str:
    return os.path.realpath(root)


def _expand_braces(pattern: str) -> Iterator[str]:
    """ "x-{0..2}.tar" -> "x-0.tar", "x-1.tar", "x-2.tar"; leading zeros are kept."""
    match = _BRACES.search(pattern)
    if not match:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    counted = _RANGE.fullmatch(match[1])
    if counted:
        first, last = int(counted[1]), int(counted[2])
        if abs(last - first) >= _MAX_EXPANSION:
            raise UserError(f"{pattern!r} names more than {_MAX_EXPANSION:,} files")
        step = 1 if first <= last else -1
        options: Iterator[str] = (str(number).zfill(len(counted[1])) for number in range(first, last + step, step))
    else:
        options = iter(match[1].split(","))
    for option in options:
        for rest in _expand_braces(after):
            yield f"{before}{option}{rest}"


def _remote(address: str) -> list[str]:
    """Copies the remote files that match into the cache, each once; returns the copies."""
    import fsspec

    scheme = address.partition("://")[0]
    with reading(address):
        system, path = fsspec.core.url_to_fs(address)
        is_pattern = glob.has_magic(path) and not scheme.startswith("http")  # a "?" begins a query there
        names = sorted(system.glob(path)) if is_pattern else [path] * system.exists(path)
        return [copied(system, scheme, name) for name in names]


@contextmanager
def reading(address: str) -> Iterator[None]:
    """Tells what goes wrong with a remote address in one line.

    Raises:
      UserError: something was raised; but for a full disk, which stays the OSError that it is.
    """
    try:
        yield
    except Exception as error:  # of the kinds that fsspec's packages raise there is no list
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in NO_SPACE):
            raise
        raise UserError(f"cannot read {address!r}: {one_line(error)}") from error


def copied(system: Any, scheme: str, name: str) -> str:
    """The copy in the cache of a file on a file system of fsspec; a new version there is another copy."""
    details = system.info(name)
    version = fingerprint(scheme, name, [str(details.get(key)) for key in ("size", "etag", "ETag", "mtime", "md5Hash")])
    target = cache_folder("remote", version) / name.rstrip("/").rpartition("/")[2]
    if not target.exists():
        with replacing(target) as temporary:
            system.get_file(name, str(temporary))
    return str(target)
