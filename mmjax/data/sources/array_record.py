"""ArrayRecord files in mmjax's own record layout (`mmjax.data.records`)."""

import hashlib
import os
import re

from mmjax import files
from mmjax.data import records
from mmjax.data.records import Fields
from mmjax.errors import RecordError, UserError, one_line
from mmjax.files import Progress, silent

_BLOCK_BYTES = 2**16


class ArrayRecordSource:
    """The packed records of all files that a pattern names, in the order of the files."""

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Opens the files.

        Args:
          location: a pattern of files (`files.expand`).
          split: not used.
          fields: has to be empty: these records are complete.
          root: not used.
          progress: not used.

        Raises:
          UserError: no file matches, one is damaged or has another layout, or fields are mapped.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if fields and fields.mapped:
            raise UserError(f"array_record:{location} holds records in mmjax's own layout: map no fields of it")
        self.paths = files.expand(location)
        for path in self.paths:
            if re.search(r"\[\d+:\d+\]$", path):  # the reader would take it for a range of another file's records
                raise UserError(f"{path} ends like a range of records: rename it")
            _check(path)
        self._records = ArrayRecordDataSource(self.paths)
        ends = [_digest_of_end(path) for path in self.paths]
        self.fingerprint = files.fingerprint("array_record", files.names_and_sizes(self.paths), ends)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        try:
            return records.decode(self._records[index])
        except (RuntimeError, ValueError, OSError) as error:
            more = f" and {len(self.paths) - 1} more files" if len(self.paths) > 1 else ""
            raise RecordError(f"record {index} of {self.paths[0]}{more}: {one_line(error)}") from error


def _digest_of_end(path: str) -> str:
    """Of the block with every record's place. Files are filled up to whole blocks, so their sizes alone say little."""
    with open(path, "rb") as file:
        file.seek(-_BLOCK_BYTES, os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def _check(path: str) -> None:
    """Opens a file and its first record."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        packed = ArrayRecordDataSource([path])
        if len(packed):
            records.decode(packed[0])
    except RecordError as error:
        raise UserError(
            f"{path} holds no records as mmjax/data/records.py describes: {error}; write them with mmjax.prepare"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:  # RuntimeError is the reader's own
        raise UserError(f"{path} is no ArrayRecord file, or is damaged: {one_line(error)}") from error
