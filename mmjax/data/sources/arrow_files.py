"""Files in Arrow's IPC format: opening them as memory maps, and converting others into them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmjax import files
from mmjax.errors import UserError, one_line
from mmjax.files import Progress


def read_arrow(path: str) -> tuple[Any, list]:
    """The schema and the batches of an IPC file in either format, without reading the rows."""
    import pyarrow as pa

    try:
        with pa.memory_map(path) as file:  # the batches keep the map, not the open file
            is_file_format = file.read(6) == b"ARROW1"
            file.seek(0)
            if not is_file_format:
                reader = pa.ipc.open_stream(file)
                return reader.schema, list(reader)
            reader = pa.ipc.open_file(file)
            return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Arrow file, or is damaged: {one_line(error)}") from error


def convert(
    originals: Sequence[str], kind: str, read: Callable[[str], tuple[Any, Iterable]], progress: Progress
) -> list[str]:
    """Copies of files in Arrow's stream format, in the cache; made where they are not there yet.

    Args:
      originals: the files. One that changes its size or time of change gets another copy.
      kind: the folder in the cache.
      read: gives a file's schema and its batches of rows.
      progress: shows the iteration over the files.

    Raises:
      UserError: a file cannot be read, or the cache cannot be written.
      OSError: no space is left.
    """
    targets = [_copy_of(path, kind) for path in originals]
    missing = {target: path for path, target in zip(originals, targets, strict=True) if not target.exists()}
    if missing:
        for target, path in progress(missing.items(), len(missing), f"converting {len(missing):,} {kind} files"):
            _write_arrow(target, path, read)
    return [str(target) for target in targets]


def _copy_of(path: str, kind: str) -> Path:
    status = os.stat(path)
    name = files.fingerprint(os.path.abspath(path), status.st_size, status.st_mtime_ns)
    return files.cache_folder(kind) / f"{name}.arrow"


def _write_arrow(target: Path, path: str, read: Callable[[str], tuple[Any, Iterable]]) -> None:
    import pyarrow as pa

    batches = _guarded(read, path)
    schema = next(batches)
    with (
        files.replacing(target) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def _guarded(read: Callable[[str], tuple[Any, Iterable]], path: str) -> Iterator:
    """The schema, then the batches; what goes wrong in reading (not in writing) is the file's fault."""
    import pyarrow as pa

    try:
        schema, batches = read(path)
        yield schema
        yield from batches
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {path}, or it is damaged: {one_line(error)}") from error
