"""What a preparation is told: its settings, the sources that take part, and where things lie in its folder."""

import re
from dataclasses import dataclass

from etils import epath

from mmjax.data import duplicates
from mmjax.data.records import Fields
from mmjax.errors import UserError

STATE = ".prepare"
ANY_FIELDS = Fields()
# Why a record is dropped; the first that applies counts. They are stored by their number.
BROKEN, NO_IMAGE, TOO_SMALL, TOO_LONG_SHAPE, NO_CAPTION, CAPTION_LENGTH, EXCLUDED, EXACT, NEAR = REASONS = (
    "cannot be read",
    "has no image",
    "image too small",
    "image too elongated",
    "no caption",
    "captions too short or too long",
    "occurs in an excluded source",
    "the same image as an earlier record",
    "nearly the same image as an earlier record",
)
_CHUNK = 64  # records; what a stopped scan does again
_MAX_CHUNKS = 4096


@dataclass(frozen=True)
class Settings:
    """What decides the result; the program's flags of the same names explain them."""

    source: str
    split: str = ""
    fields: Fields = ANY_FIELDS
    root: str = ""
    exclude: tuple[tuple[str, str, str], ...] = ()  # (source, split, root)
    name: str = "dataset"
    out_split: str = "train"
    shards: int = 8
    short_side: int = 0
    min_side: int = 16
    max_aspect: float = 8.0
    min_caption: int = 1
    max_caption: int = 1000
    keep_uncaptioned: bool = False
    near_distance: int = 3

    def __post_init__(self):
        for name in ("name", "out_split"):
            if not re.fullmatch(r"[A-Za-z]\w*", getattr(self, name)):
                raise UserError(f"--{name}={getattr(self, name)}: a letter, then letters, digits and _")
        if not -1 <= self.near_distance <= duplicates.MAX_DISTANCE:
            raise UserError(f"--near_distance={self.near_distance}: it lies in -1 (off) ... {duplicates.MAX_DISTANCE}")
        if self.shards < 1 or self.shards > 99_999:
            raise UserError(f"--shards={self.shards}: it lies in 1 ... 99999")
        if self.max_caption < self.min_caption:
            raise UserError(f"--max_caption={self.max_caption} is less than --min_caption={self.min_caption}")
        if min(self.short_side, self.min_side, self.min_caption) < 0 or 0 < self.max_aspect < 1:
            raise UserError("--short_side, --min_side and --min_caption are 0 or more; --max_aspect is 0 or at least 1")


@dataclass(frozen=True)
class Origin:
    """A source that takes part. Its records' ids count from `first`; those of excluded sources are negative."""

    source: str
    split: str
    fields: Fields
    root: str
    fingerprint: str
    records: int
    first: int

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """The first index of each chunk, and the one after its last."""
        size = max(_CHUNK, -(-self.records // _MAX_CHUNKS))
        return [(begin, min(begin + size, self.records)) for begin in range(0, self.records, size)]


@dataclass(frozen=True)
class Plan:
    """All that a worker is told."""

    settings: Settings
    out: epath.Path
    origins: tuple[Origin, ...]  # the source, then the excluded ones

    @property
    def state(self) -> epath.Path:
        return self.out / STATE

    def scanned(self, origin: int, begin: int) -> epath.Path:
        return self.state / "scan" / f"{origin}-{begin:012d}.json"

    def shard(self, number: int, total: int) -> epath.Path:
        name = f"{self.settings.name}-{self.settings.out_split}.array_record-{number:05d}-of-{total:05d}"
        return self.out / name
