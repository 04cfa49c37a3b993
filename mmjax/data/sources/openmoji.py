"""The embedded data set, as a source: built on first use."""

from mmjax import files
from mmjax.data import emoji_classes, openmoji
from mmjax.data.records import Fields
from mmjax.data.sources.array_record import ArrayRecordSource
from mmjax.errors import UserError
from mmjax.files import Progress, silent


class OpenMojiSource(ArrayRecordSource):
    """The records of one split of `mmjax.data.openmoji`, or of all, with their captions in some languages or in all.

    A record's label is the number of its subgroup (`mmjax.data.emoji_classes`). The names of its `group` and `subgroup`
    are groups of captions, which only those get who ask for them.
    """

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
          location: languages ("en", "en,de"), "group" or "subgroup": what captions are to be; "" is all languages.
          split: "train", "test" or "all".
          fields: has to be empty.
          root: not used.
          progress: `progress(items, total, title)` wraps the iteration over the drawings to show it.

        Raises:
          UserError: an unknown language or split, mapped fields, or a cache that cannot be written.
        """
        self._groups = tuple(filter(None, location.split(","))) or openmoji.LANGUAGES
        known = (*openmoji.LANGUAGES, *emoji_classes.NAMES)
        for group in self._groups:
            if group not in known:
                raise UserError(f'openmoji has no language "{group}"; known: {", ".join(known)}')
        if split not in (*openmoji.SPLITS, "all"):
            raise UserError(f'openmoji has no split "{split}"; known: {", ".join(openmoji.SPLITS)}, all')
        folder = openmoji.prepare(progress)
        super().__init__(str(folder / f"{'*' if split == 'all' else split}.array_record"), fields=fields)
        self.fingerprint = files.fingerprint("openmoji", folder.name, split, self._groups)

    def __getitem__(self, index: int) -> dict:
        record = super().__getitem__(index)
        found = emoji_classes.class_of(record["key"])
        names = {name: [getattr(found, name)] if found else [] for name in emoji_classes.NAMES}
        captions = record["captions"] | names
        label = found.number if found else -1
        return record | {"label": label, "captions": {group: captions[group] for group in self._groups}}
