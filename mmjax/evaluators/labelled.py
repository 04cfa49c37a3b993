"""What evaluators on labelled images share: their data, the features of it, and how classes are counted."""

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num
from ml_collections import ConfigDict

from mmjax.api import Model
from mmjax.data.pipeline import captions_of
from mmjax.data.sources import open_entry
from mmjax.errors import UserError
from mmjax.evaluators.images import Images, unreadable


class Split(NamedTuple):
    """Features of images, and their classes: places in the sorted classes of the training split."""

    features: Float[np.ndarray, "images width"]
    labels: Int[np.ndarray, " images"]


class Labelled:
    """Labelled images of one source: a classifier learns from `train_split` and is tested on `split`.

    A record's class is its `label`, or its first caption in the group `class_caption`.
    """

    def __init__(self, entry: ConfigDict):
        self._entry, self._beat = entry, lambda: None

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """Opens the data and checks it; reads every record once, without its image where that lies apart.

        Raises:
          UserError: data is missing, both splits are the same, a record has no class, there are fewer than two, or the
            class of a test image never occurs in training.
        """
        self._beat, entry = beat, self._entry
        entries = [entry.to_dict() | {"split": split} for split in (entry.train_split, entry.split)]
        self._train, self._test = map(open_entry, entries)
        if self._train.fingerprint == self._test.fingerprint:
            raise UserError(
                f'train_split "{entry.train_split}" and split "{entry.split}" are the same data; where a source has no '
                "splits, write {split} in its location"
            )
        names = [name for _, name in self._classes(entries[0])]
        self._class_names = sorted(set(names))
        numbers = {name: number for number, name in enumerate(self._class_names)}
        self._class_count = len(numbers)
        if len(numbers) < 2:
            raise UserError(f'split "{entry.train_split}" has the one class {names[0]!r}: nothing to tell apart')
        self._train_labels, labels = np.array([numbers[name] for name in names]), []
        for key, name in self._classes(entries[1]):
            if name not in numbers:
                raise UserError(
                    f'record {key!r} of split "{entry.split}" is of class {name!r}, which never occurs in split '
                    f'"{entry.train_split}"'
                )
            labels.append(numbers[name])
        self._test_labels = np.array(labels)

    def _classes(self, entry: Mapping) -> Iterator[tuple[str, int | str]]:
        """Key and class of each record."""
        source = open_entry(entry, images=False)
        for index in range(len(source)):
            record = source[index]
            yield record["key"], _class_of(record, self._entry.class_caption)
            self._beat()

    def _features(
        self, model: Model, train_rows: Int[np.ndarray, " rows"] | None = None
    ) -> Generator[tuple[str, float], None, tuple[Split, Split]]:
        """Yields how many images were unreadable, where some were; returns the training and the test split.

        Of the training split, only `train_rows` where they are given.
        """
        rows, size = np.arange(len(self._train)) if train_rows is None else train_rows, self._entry.batch_size
        load_train, load_test = Images(self._train, model, rows), Images(self._test, model)
        train = Split(model.features_rows("image", len(rows), load_train, size), self._train_labels[rows])
        test = Split(model.features_rows("image", len(self._test), load_test, size), self._test_labels)
        yield from unreadable(load_train, load_test)
        return train, test


def _class_of(record: dict, group: str) -> int | str:
    if group:
        return captions_of(record, (group,))[0]
    if record["label"] == -1:
        raise UserError(
            f"record {record['key']!r} has no label, which is a whole number; where classes have names, name their "
            "field in fields.captions and in class_caption"
        )
    return record["label"]


def places_in_class(labels: Int[np.ndarray, " images"], seed: int) -> Int[np.ndarray, " images"]:
    """Each image's place (from 0) among those of its class, in an order that is drawn from the seed."""
    drawn = np.random.default_rng(seed).permutation(len(labels))
    order = drawn[np.argsort(labels[drawn], kind="stable")]
    counts = np.bincount(labels)
    result = np.empty(len(labels), np.int64)
    result[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return result


def correct(
    scores: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, " images"]
) -> Float[np.ndarray, " images"]:
    """1 where the class with the highest score is right, else 0; NaNs earn nothing."""
    return np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(axis=1)) == labels


def place(mesh: Mesh, rows: Num[np.ndarray, "rows ..."], split: bool = True) -> Num[Array, "padded_rows ..."]:
    """Copies an array, the same in every process, to the devices.

    With `split`, its rows are split over the data-parallel ones; zeros fill it up to what they divide.
    """
    if split:
        missing = -len(rows) % (mesh.shape["data"] * mesh.shape["fsdp"])
        rows = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
    sharding = NamedSharding(mesh, P(("data", "fsdp")) if split else P())
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
