"""The input pipeline: the batch of step s is a pure function of (config, seed, s).

Element g of a stream is a record that its shuffled sources yield at place g, changed with random numbers that depend
on the seed and g alone. Row r of the stream's batch b is element `b * batch_size + r`. So neither threads, workers,
processes nor a resumed run change any batch: the step number is the whole state.

A record that cannot be read is replaced by another one, drawn from the same random numbers; its place in the order
stays, so nothing after it moves.
"""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from mmjax.data import image
from mmjax.data.augment import Augment
from mmjax.data.image_reader import GREY, Reader, Rows
from mmjax.data.sources import Source
from mmjax.data.text import Tokenizer
from mmjax.errors import RecordError, UserError

Batch = dict[str, np.ndarray]
REPLACEMENTS = 32  # so many unreadable records in a row end the run
MAX_MESSAGE = 300  # characters told of one: keys come from the data
PROBES = 8
CAPTION_CHOICES = ("random", "cycle", "first", "join")
INPUTS = ("image", "text")  # what a batch may hold of its records


class NoCaption(RecordError):
    """A record without a caption in the groups that are looked at."""


@dataclass(frozen=True)
class CaptionChoice:
    """Which caption of a record is trained on this time.

    `groups` are names in the record's `captions`, () for all of them. `choice` is "random" (one of all their captions;
    with `weights`, first a group by weight), "cycle" (another one each epoch, in turn), "first", or "join" (all, one
    after the other).
    """

    groups: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    choice: str = "random"

    def __call__(self, record: dict, epoch: int, rng: np.random.Generator) -> str:
        captions = captions_of(record, self._weighted(record, rng) if self.weights else self.groups)
        match self.choice:
            case "first":
                return captions[0]
            case "cycle":
                return captions[epoch % len(captions)]
            case "join":
                return " ".join(captions)
        return captions[int(rng.integers(len(captions)))]

    def _weighted(self, record: dict, rng: np.random.Generator) -> tuple[str, ...]:
        """One of the groups that the record has, or all with a weight where it has none of them."""
        wanted = {group: weight for group, weight in zip(self.groups, self.weights, strict=True) if weight}
        there = [group for group in wanted if record["captions"].get(group)]
        if not there:
            return tuple(wanted)
        shares = np.cumsum([wanted[group] for group in there])
        return (there[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))],)


@dataclass(frozen=True)
class TrainExample:
    """Turns places in a stream's sources into rows of a training batch.

    Without `augment` (None) a batch holds no images, and none is decoded; without `captions` it holds no text. With
    `captions_optional` a record without a caption is as good as any other, and its text is all padding.
    """

    sources: tuple[Source, ...]
    augment: Augment | None
    captions: CaptionChoice | None
    tokenizer: Tokenizer | None
    text_length: int
    captions_optional: bool = False

    def batch(self, places: Sequence[tuple[int, int, int]], rngs: Sequence[np.random.Generator]) -> Batch:
        """The rows of a batch.

        Args:
          places: (number of the source, epoch, number of the record) for each row.
          rngs: the random numbers of each row; all choices come from them.

        Returns:
          `image` uint8 [rows, size, size, 3]; `text` int32 [rows, length]; with `captions_optional`, `has_text` bool
          [rows], False where the record has no caption; and `broken`: one line of text for each record that could not
          be read.
        """
        batch: Batch = {}
        if self.augment is not None:
            size = self.augment.size
            batch["image"] = np.empty((len(places), size, size, 3), np.uint8)
        captions, broken = [], []
        for row, (place, rng) in enumerate(zip(places, rngs, strict=True)):
            pixels, caption = self._row(*place, rng, broken)
            if self.augment is not None:
                batch["image"][row] = pixels
            captions.append(caption)
        if self.captions is not None:
            batch |= self._text(captions)
        return batch | {"broken": np.array(broken, np.str_)}

    def _row(self, source_number: int, epoch: int, index: int, rng: np.random.Generator, broken: list[str]):
        source = self.sources[source_number]
        for _ in range(REPLACEMENTS):
            try:
                record = source[index]
                caption = None if self.captions is None else self._caption(record, epoch, rng)
                pixels = None if self.augment is None else self._pixels(record, rng)
                return pixels, caption
            except RecordError as error:
                broken.append(str(error)[:MAX_MESSAGE])
                index = int(rng.integers(len(source)))
        broken.append(f"{REPLACEMENTS} records in a row")
        return 0, ""

    def _caption(self, record: dict, epoch: int, rng: np.random.Generator) -> str | None:
        try:
            return self.captions(record, epoch, rng)
        except NoCaption:
            if not self.captions_optional:
                raise
            return None

    def _text(self, captions: Sequence[str | None]) -> Batch:
        text = self.tokenizer.encode([caption or "" for caption in captions], self.text_length)
        if not self.captions_optional:
            return {"text": text}
        has_text = np.array([caption is not None for caption in captions], bool)
        text[~has_text] = self.tokenizer.pad_id  # an empty text would have its start and end tokens
        return {"text": text, "has_text": has_text}

    def _pixels(self, record: dict, rng: np.random.Generator) -> image.Pixels:
        data = pixels_or_bytes(record)
        try:
            return self.augment(data, record["mirror"], rng)
        except RecordError as error:
            raise RecordError(f"record {record['key']!r}: {error}") from None


class DecodedInMemory:
    """A source whose records keep their decoded pixels after the first read, for data that fits in memory."""

    def __init__(self, source: Source):
        self._source, self._records = source, {}
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        if index not in self._records:
            record = self._source[index]
            self._records[index] = record | {"pixels": decode_image(record)}
        return self._records[index]


def pixels_or_bytes(record: dict) -> image.Pixels | bytes:
    """The record's image, decoded where it is kept in memory.

    Raises:
      RecordError: it has none.
    """
    if "pixels" in record:
        return record["pixels"]
    if "image" not in record:
        raise RecordError(f"record {record['key']!r} has no image")
    return record["image"]


def decode_image(record: dict) -> image.Pixels:
    """The record's pixels, exactly as they are stored.

    Raises:
      RecordError: they are missing or cannot be decoded; the message names the record.
    """
    data = pixels_or_bytes(record)
    try:
        return data if isinstance(data, np.ndarray) else image.decode(data)
    except RecordError as error:
        raise RecordError(f"record {record['key']!r}: {error}") from None


def check_readable(source: Source, groups: Sequence[str], inputs: Sequence[str] = INPUTS) -> None:
    """Tells before a run starts that a source's images or captions are not where they are looked for.

    Args:
      source: of a stream.
      groups: of captions; () is all.
      inputs: which of `INPUTS` a record has to have.

    Raises:
      UserError: none of eight records, evenly spaced, has them; it says what is wrong with the first.
    """
    first_error = None
    for index in np.linspace(0, len(source) - 1, PROBES).astype(int).tolist():
        try:
            record = source[index]
            if "text" in inputs:
                captions_of(record, groups)
            if "image" in inputs:
                decode_image(record)
            return
        except RecordError as error:
            first_error = first_error or error
    raise UserError(f"no record can be used: {first_error}")


def captions_of(record: dict, groups: Sequence[str] = ()) -> list[str]:
    """All captions of a record in these groups (languages, or fields that they come from); () is all of them.

    Raises:
      NoCaption: the record has none.
    """
    found = record["captions"]
    captions = [caption for group in groups or found for caption in found.get(group, ())]
    if not captions:
        wanted = f" in {', '.join(groups)}" if groups else ""
        there = ", ".join(map(repr, found))[:200] or "none"
        raise NoCaption(f"record {record['key']!r} has no caption{wanted}; it has {there}")
    return captions


class _Batches(grain.MapDataset):
    """Element b holds the given rows of a stream's batch b."""

    def __init__(
        self, places: grain.MapDataset, example: TrainExample, seed: int, batch_size: int, rows: Sequence[int]
    ):
        super().__init__(places)
        self._example, self._seed, self._batch_size = example, seed, batch_size
        self._rows = [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        elements = [index * self._batch_size + row for row in self._rows]
        # Philox is made for this: any key is a stream of its own.
        rngs = [np.random.Generator(np.random.Philox(key=[self._seed, element])) for element in elements]
        return self._example.batch([self._parent[element] for element in elements], rngs)


def places(lengths: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The endless order of a stream: element g is (number of the source, epoch of it, number of the record).

    Each source is shuffled anew in each of its epochs, and repeats. After any number of elements each has had its
    share, give or take one.

    Args:
      lengths: records of each source.
      weights: positive shares of the sources.
      seed: decides the order.
    """
    parts = []
    for number, length in enumerate(lengths):
        order = grain.MapDataset.range(length).seed(seed + 7919 * number).shuffle().repeat()
        parts.append(order.map_with_index(_Place(number, length)))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(weights))


@dataclass(frozen=True)
class _Place:
    """What `places` makes of an element; loader processes receive it pickled."""

    number: int
    length: int

    def __call__(self, element: int, index: int) -> tuple[int, int, int]:
        return self.number, element // self.length, index


def stream_dataset(
    entry: ConfigDict,
    opened: Mapping[str, Source],
    tokenizer: Tokenizer | None,
    encoders: ConfigDict,
    seed: int,
    rows: Sequence[int],
) -> grain.MapDataset:
    """The endless data set whose element b holds these rows of the stream's batch b (see `TrainExample.batch`).

    Args:
      entry: the stream's config.
      opened: its sources by name, as `mmjax.data.sources.open_stream` gives them.
      tokenizer: for the captions; not used by a stream without text.
      encoders: `config.model.encoders`.
      seed: decides the order and every augmentation.
      rows: which rows of the global batch.
    """
    options = dict(entry.preprocess)
    choice = CaptionChoice(*(options.pop(f"caption{name}") for name in ("s", "_weights", "_choice")))
    length = options.pop("text_length")
    augment, sources = None, tuple(opened.values())
    if "image" in entry.inputs:
        augment = Augment(encoders.image.image_size, **options)
        sources = tuple(map(DecodedInMemory, sources)) if entry.keep_decoded else sources
    if "text" in entry.inputs:
        length = length or encoders.text.length
        example = TrainExample(sources, augment, choice, tokenizer, length, entry.captions_optional)
    else:
        example = TrainExample(sources, augment, None, None, 0)
    return _Batches(_stream_places(entry, sources, seed), example, seed, entry.batch_size, rows)


def _stream_places(entry: ConfigDict, sources: Sequence[Source], seed: int) -> grain.MapDataset:
    lengths = [len(source) for source in sources]
    shares = [
        (part.weight or records) * part.upsampling
        for part, records in zip(entry.mixture.values(), lengths, strict=False)
    ]
    return places(lengths, shares, seed)


def stream_schedule(weights: Mapping[str, float], steps: int) -> list[str]:
    """The stream of each step: after every step, each stream has had its share, give or take one batch.

    Args:
      weights: stream -> positive weight.
      steps: how many steps.
    """
    names = list(weights)
    shares = np.array([weights[name] for name in names], np.float64)
    shares /= shares.sum()
    taken = np.zeros(len(names))
    schedule = []
    for step in range(1, steps + 1):
        chosen = int(np.argmax(shares * step - taken))
        taken[chosen] += 1
        schedule.append(names[chosen])
    return schedule


def train_batches(
    config: ConfigDict,
    sources: Mapping[str, Mapping[str, Source]],
    tokenizer: Tokenizer,
    rows: Mapping[str, Int[np.ndarray, " local_rows"]],
    start: int,
    steps: int,
) -> Iterator[tuple[str, Batch, list[str]]]:
    """Yields (stream, this process's rows of the batch, unreadable records) for each step from `start` to `steps` - 1.

    Args:
      config: the whole config.
      sources: stream -> its opened sources.
      tokenizer: for the captions.
      rows: stream -> which rows of its global batch this process loads.
      start: the first step to yield.
      steps: the end of the run.

    Raises:
      UserError: so many records in a row could not be read that there is no batch.
    """
    schedule = stream_schedule({name: entry.weight for name, entry in config.streams.items()}, steps)
    iterators = {}
    for number, (name, entry) in enumerate(config.streams.items()):
        seed = _stream_seed(config, number)
        dataset = stream_dataset(entry, sources[name], tokenizer, config.model.encoders, seed, rows[name])
        first, count = schedule[:start].count(name), schedule.count(name)
        iterators[name] = _iterate(dataset[first:count], config.loader) if first < count else iter(())
    try:
        for name in schedule[start:]:
            batch = next(iterators[name])
            broken = batch.pop("broken").tolist()
            if len(broken) > REPLACEMENTS and f"{REPLACEMENTS} records in a row" in broken:
                raise UserError(f"stream {name}: {REPLACEMENTS} records in a row cannot be read: {broken[-2]}")
            if config.loader.workers:  # out of the workers' shared memory, which jax may hold on to up to the end
                batch = {key: np.array(value) for key, value in batch.items()}
            yield name, batch, broken
    finally:
        _close(iterators)


def _stream_seed(config: ConfigDict, number: int) -> int:
    return config.seed + 1_000_003 * number


def records_of_step(config: ConfigDict, sources: Mapping[str, Mapping[str, Source]], step: int) -> dict:
    """Which records the global batch of a step was to hold: what can be looked at when the step went wrong.

    Args:
      config: the whole config.
      sources: stream -> its opened sources.
      step: counted from 1, as metrics and checkpoints do: the step after which so many are done.

    Returns:
      `step`, `stream`, `batch` (its number in the stream) and `records`, a list of `row`, `source` (its name in the
      mixture), `index` and `key`. The key of a record that cannot be read is None: another one took its place.
    """
    # The schedule up to here is the beginning of the whole run's.
    *before, stream = stream_schedule({name: entry.weight for name, entry in config.streams.items()}, step)
    entry, batch = config.streams[stream], before.count(stream)
    names, opened = [*sources[stream]], [*sources[stream].values()]
    order = _stream_places(entry, opened, _stream_seed(config, [*config.streams].index(stream)))
    found = []
    for row in range(entry.batch_size):
        number, _, index = order[batch * entry.batch_size + row]
        try:
            key = opened[number][index]["key"]
        except RecordError:
            key = None
        found.append({"row": row, "source": names[number], "index": int(index), "key": key})
    return {"step": step, "stream": stream, "batch": batch, "records": found}


def _close(iterators: dict[str, Iterator[Batch]]) -> None:
    """Ends the worker processes, and frees the shared memory of what they read ahead."""
    while iterators:
        _, iterator = iterators.popitem()
        if isinstance(iterator, grain.DatasetIterator):
            iterator.close()
    gc.collect()  # grain's iterators hold their last element in a cycle


def _iterate(dataset: grain.MapDataset, loader: ConfigDict) -> Iterator[Batch]:
    # An element is a batch, so reading ahead is counted in batches, and workers can neither lose nor reorder rows.
    options = grain.ReadOptions(num_threads=loader.threads, prefetch_buffer_size=loader.prefetch)
    batches = dataset.to_iter_dataset(options)
    if loader.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=loader.workers), _start_worker)
    return iter(batches)


def _start_worker(index: int, count: int) -> None:
    """Leaves signals, which a group of processes gets, to the one that trains, and ends with it, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def evaluation_images(source: Source, reader: Reader, indices: Sequence[int]) -> tuple[Rows, list[str]]:
    """Records' images as evaluation sees them.

    An image that cannot be read is grey, so that the number of images does not depend on it; also returned is a line
    of text for each of these.
    """
    broken: list[str] = []

    def images() -> Iterator[image.Pixels]:  # one at a time: as they are stored they can be large
        for index in indices:
            try:
                yield decode_image(source[int(index)])
            except RecordError as error:
                broken.append(str(error))
                yield GREY

    return reader(images()), broken
