"""The embedded data set, as a source: built on first use."""

from mmjax import files
from mmjax.data import openmoji
from mmjax.data.records import Fields
from mmjax.data.sources.array_record import ArrayRecordSource
from mmjax.errors import UserError
from mmjax.files import Progress, silent


class OpenMojiSource(ArrayRecordSource):
    """The records of one split of `mmjax.data.openmoji`, or of all, with their captions in some languages or in all."""

    def __init__(
        self,
        location: str = "",
        split: str = "train",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Builds the data set if it is not there yet.

        Args:
          location: languages ("en", "en,de"); "" is all.
          split: "train", "test" or "all".
          fields: has to be empty.
          root: not used.
          progress: `progress(items, total, title)` wraps the iteration over the drawings to show it.

        Raises:
          UserError: an unknown language or split, mapped fields, or a cache that cannot be written.
        """
        self._languages = tuple(filter(None, location.split(","))) or openmoji.LANGUAGES
        for language in self._languages:
            if language not in openmoji.LANGUAGES:
                raise UserError(f'openmoji has no language "{language}"; known: {", ".join(openmoji.LANGUAGES)}')
        if split not in (*openmoji.SPLITS, "all"):
            raise UserError(f'openmoji has no split "{split}"; known: {", ".join(openmoji.SPLITS)}, all')
        folder = openmoji.prepare(progress)
        super().__init__(str(folder / f"{'*' if split == 'all' else split}.array_record"), fields=fields)
        self.fingerprint = files.fingerprint("openmoji", folder.name, split, self._languages)

    def __getitem__(self, index: int) -> dict:
        record = super().__getitem__(index)
        return record | {"captions": {language: record["captions"][language] for language in self._languages}}
