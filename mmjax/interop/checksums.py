"""Checksums of a folder's files."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mmjax.errors import UserError
from mmjax.files import cache_folder, fingerprint, write_atomically

FILE = "SHA256SUMS"
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}


def write_checksums(folder: Path) -> None:
    """Writes `SHA256SUMS` of all files of a folder and below, in the format of `sha256sum`, which can check it."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != FILE:
            escaped = name.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
            lines.append(f"{chr(92) if escaped != name else ''}{_sha256(path)}  {escaped}\n")
    write_atomically(folder / FILE, "".join(lines).encode("utf-8", "surrogateescape"))


def listed(folder: Path, source: str) -> dict[str, str]:
    """The checksums that a folder's `SHA256SUMS` has, by name; none where it has no such file.

    Raises:
      UserError: it is damaged.
    """
    try:
        lines = (folder / FILE).read_text("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{source}: {FILE}: {error.strerror}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match:
            name = re.sub(r"\\[\\nr]", lambda escape: _ESCAPES[escape[0]], match[3]) if match[1] else match[3]
            found[name.removeprefix("./")] = match[2].lower()
        elif line.strip():
            raise UserError(f"{source}: {FILE} is damaged: line {number} is no checksum and name")
    return found


def verify(folder: Path, names: Iterable[str], source: str) -> None:
    """Compares files with their checksums: those of `SHA256SUMS`, and those that the hub's cache names its files by.

    A file is read once: that it was right is kept in the cache, until its size, time or place change.

    Args:
      folder: where the files lie.
      names: of the files.
      source: what messages call the folder.

    Raises:
      UserError: a file is not what its checksum says, or cannot be read.
    """
    sums = listed(folder, source)
    for name in names:
        path = folder / name
        expected = {sums[name]: f"its line in {FILE}"} if name in sums else {}
        real = Path(os.path.realpath(path))
        if real.parent.name == "blobs" and _DIGEST.fullmatch(real.name):
            expected[real.name] = f"its checksum on the hub; remove {real} to get it anew"
        for digest, what in expected.items():
            try:
                right = _matches(real, digest)
            except OSError as error:
                raise UserError(f"{source}: {name}: {error.strerror}") from error
            if not right:
                raise UserError(f"{source}: {name} is damaged or was changed: its SHA-256 is not {what}")


def _matches(path: Path, digest: str) -> bool:
    status = path.stat()
    marker = None
    # Where the cache cannot be written the file is read each time.
    with contextlib.suppress(UserError):
        marker = cache_folder("verified") / fingerprint(digest, str(path), status.st_size, status.st_mtime_ns)
        if marker.exists():
            return True
    right = _sha256(path) == digest
    if right and marker:
        with contextlib.suppress(OSError):
            marker.touch()
    return right


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
