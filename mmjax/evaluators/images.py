"""Loading the images of a source as a model's tower reads them."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from mmjax.api import Model
from mmjax.data.image_reader import Reader, Rows
from mmjax.data.pipeline import evaluation_images, pixels_or_bytes
from mmjax.data.sources import Source


class Images:
    """Loads rows: those of `source`, or its records `places[row]`. Remembers which could not be read: they are grey."""

    def __init__(self, source: Source, model: Model, places: Int[np.ndarray, " rows"] | None = None):
        self._source, self._places = source, places
        self._reader = Reader.of(model.config.model.encoders.image)
        self.broken: set[str] = set()

    def __call__(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        """These rows, as the tower reads them."""
        places = rows if self._places is None else self._places[rows]
        pixels, broken = evaluation_images(self._source, self._reader, places)
        self.broken.update(broken)
        return pixels


def identity(record: Mapping[str, Any]) -> bytes:
    """Equal for records of the same image: a digest of its bytes."""
    return hashlib.sha256(pixels_or_bytes(record)).digest()


def unreadable(*images: Images) -> Iterator[tuple[str, float]]:
    """The metric `unreadable_images`, where there are some: of this process's rows, as far as they were loaded."""
    count = sum(len(each.broken) for each in images)
    if count:
        yield "unreadable_images", float(count)
