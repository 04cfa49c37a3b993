"""The embedded data set, as a source: built on first use."""

from collections.abc import Callable, Iterable

from mmjax import files
from mmjax.data import openmoji
from mmjax.data.records import Fields
from mmjax.data.sources.array_record import ArrayRecordSource
from mmjax.errors import UserError


class OpenMojiSource(ArrayRecordSource):
    """The records of one split of `mmjax.data.openmoji`, or of all."""

    def __init__(
        self,
        location: str = "",
        split: str = "train",
        fields: Fields | None = None,
        root: str = "",
        progress: Callable[[Iterable, int, str], Iterable] | None = None,
    ):
        """Builds the data set if it is not there yet.

        Args:
          location: has to be empty.
          split: "train", "test" or "all".
          fields: has to be empty.
          root: not used.
          progress: `progress(items, total, title)` wraps the iteration over the drawings to show it.

        Raises:
          UserError: a location, an unknown split, mapped fields, or a cache that cannot be written.
        """
        if location:
            raise UserError(f'openmoji takes no location: write "openmoji", not "openmoji:{location}"')
        if split not in (*openmoji.SPLITS, "all"):
            raise UserError(f'openmoji has no split "{split}"; known: {", ".join(openmoji.SPLITS)}, all')
        folder = openmoji.prepare(*([progress] if progress else []))
        super().__init__(str(folder / f"{'*' if split == 'all' else split}.array_record"), fields=fields)
        self.fingerprint = files.fingerprint("openmoji", folder.name, split)
