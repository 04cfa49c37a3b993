"""The input pipeline: the batch of step s is a pure function of (config, seed, s).

Element g of a stream is record `shuffle(g)` of its source, augmented with random numbers that depend
on the seed and g alone. Row r of the stream's batch b is element `b * batch_size + r`. So neither
threads, workers, processes nor a resumed run change any batch: the step number is the whole state.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from mmjax.data import image
from mmjax.data.sources import Source
from mmjax.data.text import Tokenizer
from mmjax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainExample:
    """Turns a record into one row of a training batch."""

    tokenizer: Tokenizer
    languages: tuple[str, ...]
    image_size: int
    text_length: int
    crop_min_area: float
    crop_max_aspect: float
    mirror: float

    def __call__(self, record: dict, rng: np.random.Generator) -> Batch:
        """`image` uint8 [size, size, 3] and `text` int32 [length]; all choices come from `rng`."""
        pixels = record["pixels"] if "pixels" in record else decode_image(record)
        pixels = image.random_resized_crop(pixels, self.image_size, self.crop_min_area, self.crop_max_aspect, rng)
        if rng.random() < self.mirror and record["mirror"]:
            pixels = image.mirror(pixels)
        captions = captions_of(record, self.languages)
        caption = captions[rng.integers(len(captions))]
        return {"image": pixels, "text": self.tokenizer.encode([caption], self.text_length)[0]}


class DecodedInMemory:
    """A source whose records keep their decoded pixels after the first read, for data that fits in memory."""

    def __init__(self, source: Source):
        self._source, self._records = source, {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        if index not in self._records:
            record = self._source[index]
            self._records[index] = record | {"pixels": decode_image(record)}
        return self._records[index]


def decode_image(record: dict) -> image.Pixels:
    """The record's pixels.

    Raises:
      UserError: they cannot be decoded; the message names the record.
    """
    try:
        return image.decode(record["image"])
    except UserError as error:
        raise UserError(f"record {record['key']}: {error}") from None


def captions_of(record: dict, languages: Sequence[str]) -> list[str]:
    """All captions of a record in these languages.

    Raises:
      UserError: the record has none.
    """
    captions = [caption for language in languages for caption in record["captions"].get(language, ())]
    if not captions:
        raise UserError(
            f"record {record['key']} has no caption in {', '.join(languages)}; it has {', '.join(record['captions'])}"
        )
    return captions


class _BatchRows(grain.MapDataset):
    """Keeps the given rows of every batch: element i is row `rows[i % n]` of batch `i // n`."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._batch_size = batch_size
        self._rows = [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def stream_dataset(
    source: Source, example: TrainExample, seed: int, batch_size: int, rows: Sequence[int]
) -> grain.MapDataset:
    """The endless data set whose element b holds these rows of the stream's batch b."""
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(example)
    return _BatchRows(dataset, batch_size, rows).batch(len(rows))


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
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    rows: Mapping[str, Int[np.ndarray, " local_rows"]],
    start: int,
    steps: int,
) -> Iterator[tuple[str, Batch]]:
    """Yields (stream, this process's rows of the batch) for each step from `start` to `steps` - 1.

    Args:
      config: the whole config.
      sources: stream -> its opened source.
      tokenizer: for the captions.
      rows: stream -> which rows of its global batch this process loads.
      start: the first step to yield.
      steps: the end of the run.
    """
    schedule = stream_schedule({name: entry.weight for name, entry in config.streams.items()}, steps)
    iterators = {}
    for number, (name, entry) in enumerate(config.streams.items()):
        preprocess = entry.preprocess
        example = TrainExample(
            tokenizer,
            tuple(preprocess.languages),
            config.model.encoders.image.image_size,
            config.model.encoders.text.length,
            preprocess.crop_min_area,
            preprocess.crop_max_aspect,
            preprocess.mirror,
        )
        seed = config.seed + 1_000_003 * number
        source = DecodedInMemory(sources[name]) if entry.keep_decoded else sources[name]
        dataset = stream_dataset(source, example, seed, entry.batch_size, rows[name])
        first, count = schedule[:start].count(name), schedule.count(name)
        iterators[name] = _iterate(dataset[first:count], config.loader) if first < count else iter(())
    for name in schedule[start:]:
        yield name, next(iterators[name])


def _iterate(dataset: grain.MapDataset, loader: ConfigDict) -> Iterator[Batch]:
    # Reading ahead is counted in batches here, because it comes after `.batch`.
    options = grain.ReadOptions(num_threads=loader.threads, prefetch_buffer_size=loader.prefetch)
    batches = dataset.to_iter_dataset(options)
    if loader.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=loader.workers))
    return iter(batches)


def evaluation_images(source: Source, image_size: int, indices: Sequence[int]) -> np.ndarray:
    """Records' images for evaluation, squashed to a square: uint8 [len(indices), size, size, 3]."""
    pixels = [image.resize(decode_image(source[int(index)]), image_size) for index in indices]
    return np.stack(pixels) if pixels else np.zeros((0, image_size, image_size, 3), np.uint8)
