"""Files: finding them, reading them within limits, writing them whole."""

import functools
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmjax.errors import RecordError, UserError

MAX_FILE_BYTES = 256 * 2**20  # of one image or one caption file
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_EXPANSION = 10_000_000


def cache_root() -> Path:
    """The folder of prepared data and compiled programs: `MMJAX_CACHE`, or `~/.cache/mmjax`."""
    return Path(os.environ.get("MMJAX_CACHE") or Path.home() / ".cache" / "mmjax")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; the folder has to exist."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            matches = _remote(name) if "://" in name else sorted(glob.glob(name))
            if not matches:
                raise UserError(f"no data at {name!r}: no such file, or the pattern matches none")
            found.extend(matches)
    return found


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits that change when any of the parts does; their `repr` decides."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def names_and_sizes(paths: Sequence[str]) -> list[tuple[str, int]]:
    """What tells one data set's files from another's, wherever they lie: their names and bytes."""
    return [(os.path.basename(path), os.path.getsize(path)) for path in paths]


def read_inside(root: str, name: str) -> bytes:
    """Reads the file `name`, a path relative to `root` or absolute, of a list that may be hostile.

    Raises:
      RecordError: it is missing, leads out of `root`, is no regular file, or has over MAX_FILE_BYTES.
    """
    try:
        real_root = _real(root)
        path = os.path.realpath(os.path.join(real_root, name))
        if os.path.commonpath([real_root, path]) != real_root:
            raise RecordError(f"{name!r} leads out of {root}; name another root to allow it")
        # Not blocking: a named pipe without a writer would hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RecordError(f"{path} is no regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise RecordError(f"{path} has {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_FILE_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RecordError(f"cannot read {name!r} in {root}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{name!r} is no path") from error  # it holds a NUL character


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
        if last - first >= _MAX_EXPANSION:
            raise UserError(f"{pattern!r} names more than {_MAX_EXPANSION:,} files")
        options: Iterator[str] = (str(number).zfill(len(counted[1])) for number in range(first, last + 1))
    else:
        options = iter(match[1].split(","))
    for option in options:
        for rest in _expand_braces(after):
            yield f"{before}{option}{rest}"


def _remote(address: str) -> list[str]:
    """Copies the remote files that match into the cache, each once; returns the copies."""
    import fsspec

    scheme = address.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(address)
        names = sorted(system.glob(path)) if glob.has_magic(path) else [path] * system.exists(path)
        return [_copy(system, scheme, name) for name in names]
    except (ImportError, ValueError) as error:  # fsspec names the package that is missing, or the unknown scheme
        raise UserError(f"cannot read {address!r}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {address!r}: {error.strerror or error}") from error


def _copy(system, scheme: str, name: str) -> str:
    details = system.info(name)
    version = fingerprint(scheme, name, [str(details.get(key)) for key in ("size", "etag", "ETag", "mtime", "md5Hash")])
    target = cache_root() / "remote" / version / name.rstrip("/").rpartition("/")[2]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            system.get_file(name, str(temporary))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return str(target)
