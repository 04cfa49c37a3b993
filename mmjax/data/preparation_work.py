"""What the workers of a preparation do with one chunk, one hash or one shard, and what they are told.

They share nothing with the process that started them but a `Plan` and the folder: they may run anywhere.
"""

import hashlib
import json
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from mmjax.data import duplicates, image, records
from mmjax.data import preparation_storage as storage
from mmjax.data.preparation_plan import (
    BROKEN,
    CAPTION_LENGTH,
    EXACT,
    EXCLUDED,
    NEAR,
    NO_CAPTION,
    NO_IMAGE,
    REASONS,
    TOO_LONG_SHAPE,
    TOO_SMALL,
    Origin,
    Plan,
    Settings,
)
from mmjax.data.records import Fields
from mmjax.errors import UserError, one_line

JPEG_QUALITY = 92
TICK = 50  # records; a writer leaves one byte for so many
PAIRS_FILES = 64  # over which pairs are spread


def open_source(origin: str, split: str, fields: Fields, root: str):
    """`mmjax.data.sources.open_source`, imported where it runs."""
    from mmjax.data import sources

    return sources.open_source(origin, split, fields, root)


_sources: dict[Origin, object] = {}
_opening = threading.Lock()


def _source(origin: Origin):
    with _opening:
        if origin not in _sources:
            source = open_source(origin.source, origin.split, origin.fields, origin.root)
            if (source.fingerprint, len(source)) != (origin.fingerprint, origin.records):
                raise UserError(f"{origin.source} has changed, or a worker sees other files than the main process")
            _sources[origin] = source
        return _sources[origin]


def scan_chunk(plan: Plan, chunk: tuple[int, int, int]) -> None:
    """Writes [reason, key or what is wrong, digest, hash] of each record of a chunk."""
    number, begin, end = chunk
    source = _source(plan.origins[number])
    settings = plan.settings if number == 0 else None
    rows = [_examine(settings, source, index) for index in range(begin, end)]
    with _system_errors_told(plan):
        storage.write(plan.scanned(number, begin), json.dumps(rows).encode())


def _examine(settings: Settings | None, source, index: int) -> tuple[int, str, str, str]:
    """Judges one record by itself; of excluded sources (no settings) only the image counts."""
    key = ""
    try:
        record = source[index]
        key = record["key"]
        if not record.get("image"):
            return REASONS.index(NO_IMAGE), key, "", ""
        pixels = np.ascontiguousarray(image.decode(record["image"]))
    except UserError as error:
        return REASONS.index(BROKEN), f"{key}: {error}"[:200] if key else f"{error}"[:200], "", ""
    reason = settings and _fault(settings, record, *pixels.shape[:2])
    if reason:
        return REASONS.index(reason), key, "", ""
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.data).hexdigest()[:32]
    value = duplicates.perceptual_hash(pixels)
    return len(REASONS), key, digest, "" if value is None else f"{value:x}"


def _fault(settings: Settings, record: dict, height: int, width: int) -> str | None:
    if min(height, width) < max(1, settings.min_side):
        return TOO_SMALL
    if settings.max_aspect and max(height, width) > settings.max_aspect * min(height, width):
        return TOO_LONG_SHAPE
    if not settings.keep_uncaptioned:
        if not any(record["captions"].values()):
            return NO_CAPTION
        if not _fitting(settings, record["captions"]):
            return CAPTION_LENGTH
    return None


def _fitting(settings: Settings, captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """The captions of the wanted lengths."""
    fitting = {
        group: [text for text in texts if settings.min_caption <= len(text) <= settings.max_caption]
        for group, texts in captions.items()
    }
    return {group: texts for group, texts in fitting.items() if texts}


# id, digest of the pixels, perceptual hash. Hashes are text: Beam's integers have a sign, and 63 bits more.
Row = tuple[int, str, str]


def read_hashes(plan: Plan, chunk: tuple[int, int]) -> Iterator[Row]:
    """The rows of a scanned chunk's good records."""
    number, begin = chunk
    rows = json.loads(storage.read(plan.scanned(number, begin)))
    for record, (reason, _, digest, value) in enumerate(rows, start=plan.origins[number].first + begin):
        if reason == len(REASONS):
            yield record, digest, value


def by_digest(row: Row) -> tuple[str, int]:
    """(digest, id): what is equal meets."""
    return row[1], row[0]


def by_band(distance: int, row: Row) -> Iterator[tuple[str, tuple[int, str]]]:
    """(band, (id, hash)): what is near meets at least once."""
    record, _, value = row
    if value:
        for number, bits in duplicates.bands(int(value, 16), distance):
            yield f"{number}:{bits:x}", (record, value)


def exact_pairs(group: tuple[str, Iterable[int]]) -> Iterator[tuple[int, int, int]]:
    """(reason, id, the lowest id with the same pixels) of all records but the lowest."""
    ids = sorted(group[1])
    yield from _named(EXACT, ((record, ids[0]) for record in ids[1:]))


def near_pairs(distance: int, group: tuple[str, Iterable[tuple[int, str]]]) -> Iterator[tuple[int, int, int]]:
    """(reason, id, the lowest id that is near) of the records that have one."""
    members = list(group[1])
    if len(members) > 1:
        ids = np.array([record for record, _ in members], np.int64)
        hashes = np.array([int(value, 16) for _, value in members], np.uint64)
        yield from _named(NEAR, duplicates.near_pairs(ids, hashes, distance))


def _named(reason: str, pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    for record, partner in pairs:
        if record >= 0:  # excluded sources stay as they are
            yield REASONS.index(EXCLUDED if partner < 0 else reason), record, partner


def by_file(pair: tuple[int, int, int]) -> tuple[int, tuple[int, int, int]]:
    """(file, pair): what is written together meets."""
    return pair[1] % PAIRS_FILES, pair


def write_pairs(plan: Plan, group: tuple[int, Iterable[tuple[int, int, int]]]) -> None:
    """Writes one file of pairs, a line for each."""
    number, pairs = group
    with _system_errors_told(plan):
        storage.write(plan.state / "pairs" / f"{number:02d}", "".join(f"{r} {i} {p}\n" for r, i, p in pairs).encode())


def write_shard(plan: Plan, total: int, number: int) -> None:
    """Writes one shard under its name, whole, and beside it in the state what is in it."""
    source = _source(plan.origins[0])
    kept, twins = _decided(plan)
    indices = kept[len(kept) * number // total : len(kept) * (number + 1) // total]
    target = plan.shard(number, total)
    with _system_errors_told(plan), _workshop(plan) as folder:
        temporary = folder / uuid.uuid4().hex
        try:
            with open(folder / f"{number:05d}.ticks", "wb", buffering=0) as ticks:
                records.write(temporary, _packed(plan.settings, source, indices, twins, ticks))
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = temporary.stat().st_size
            storage.put(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        shard = {"file": target.name, "records": len(indices), "bytes": size, "sha256": digest}
        storage.write(plan.state / "shards" / f"{number:05d}.json", json.dumps(shard).encode())


_fetched: dict[Plan, tempfile.TemporaryDirectory] = {}
_fetching = threading.Lock()


def _decided(plan: Plan) -> list[np.ndarray]:
    """kept.npy and twins.npy, mapped into memory; remote ones are fetched once by each process."""
    names, folder = ("kept.npy", "twins.npy"), plan.state
    if storage.is_remote(plan.state):
        with _fetching:
            if plan not in _fetched:
                copies = tempfile.TemporaryDirectory()
                for name in names:
                    (Path(copies.name) / name).write_bytes(storage.read(plan.state / name))
                _fetched[plan] = copies
        folder = _fetched[plan].name
    return [np.load(Path(folder) / name, mmap_mode="r") for name in names]


@contextmanager
def _workshop(plan: Plan) -> Iterator[Path]:
    """A local folder for unfinished shards; where theirs is local, it lies in it, so that they can be renamed."""
    if storage.is_remote(plan.state):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield Path(plan.state / "partial")


def _packed(settings: Settings, source, indices: np.ndarray, twins: np.ndarray, ticks) -> Iterator[bytes]:
    for done, index in enumerate(indices.tolist(), start=1):
        record = source[index]
        first, last = np.searchsorted(twins[:, 0], [index, index + 1])
        equal = [record["captions"], *(source[twin]["captions"] for twin in twins[first:last, 1].tolist())]
        fitted = {"image": _shrunk(record["image"], settings.short_side), "captions": _joined(settings, equal)}
        yield records.encode(record | fitted)
        if done % TICK == 0:
            ticks.write(b".")


def _joined(settings: Settings, all_captions: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
    """The fitting captions of records with one image, each once: some lists have a record for each caption."""
    joined: dict[str, dict[str, None]] = {}
    for captions in all_captions:
        for group, texts in _fitting(settings, captions).items():
            joined.setdefault(group, {}).update(dict.fromkeys(texts))
    return {group: list(texts)[: records.MAX_CAPTIONS] for group, texts in joined.items()}


def _shrunk(data: bytes, short_side: int) -> bytes:
    """The image with its short side at `short_side` pixels, as JPEG; smaller ones keep their bytes."""
    pixels = image.decode(data) if short_side else None
    if pixels is None or min(pixels.shape[:2]) <= short_side:
        return data
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    small = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1].tobytes()


@contextmanager
def _system_errors_told(plan: Plan) -> Iterator[None]:
    """A runner passes on the text of an error, not its kind: so it has to be one that is understood."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or plan.out}: {error.strerror}") from error
    except RuntimeError as error:  # of the ArrayRecord writer, which names the file too
        raise UserError(f"cannot write: {one_line(error)}") from error
