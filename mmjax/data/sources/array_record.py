"""ArrayRecord files in mmjax's own record layout (`mmjax.data.records`)."""

import glob

from array_record.python.array_record_data_source import ArrayRecordDataSource

from mmjax.data import records
from mmjax.errors import UserError


class ArrayRecordSource:
    """Random access to the records of all files that match a pattern, in the order of their names."""

    def __init__(self, pattern: str):
        """Opens the files.

        Args:
          pattern: a path with `*`, `?` and `[]`.

        Raises:
          UserError: no file matches, or the first record has another layout.
        """
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise UserError(f"no data at {pattern!r}: no such file, or the pattern matches none")
        self._records = ArrayRecordDataSource(self.paths)
        if len(self):
            self[0]  # tells early where the layout is another one

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        data = self._records[index]
        try:
            record = records.decode(data)
            record["key"], record["image"], record["captions"], record["mirror"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"record {index} of {self.paths[0]} (and {len(self.paths) - 1} more files) has another layout than "
                "mmjax/data/records.py describes"
            ) from error
        return record
