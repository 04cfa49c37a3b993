"""Captioning of held-out images: how many captions are exactly one of the image's own."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mmjax.api import Model
from mmjax.data.pipeline import captions_of, evaluation_images
from mmjax.data.sources import open_entry
from mmjax.evaluators import contact_sheet

SHEET = 12


class Captions:
    """The evaluator `captions`; its fields are those of `mmjax.config.captions`."""

    def __init__(self, entry: ConfigDict):
        self._entry = entry

    @cached_property
    def _source(self):
        return open_entry(self._entry)

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """Opens the data and checks it.

        Raises:
          UserError: it is missing, or a record lacks captions.
        """
        self._wanted = []
        for index in range(len(self._source)):
            self._wanted.append(captions_of(self._source[index], self._entry.captions))
            beat()

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields `exact_match`: the share of captions that are one of the image's own, up to case and spaces."""
        entry, encoder, unreadable = self._entry, model.config.model.encoders.image, {}

        def load_images(rows: np.ndarray) -> np.ndarray:
            pixels, broken = evaluation_images(self._source, encoder.image_size, encoder.resize, rows)
            unreadable.update(dict.fromkeys(broken))
            return pixels

        found = model.caption_rows(
            len(self._wanted),
            load_images,
            batch_size=entry.batch_size,
            beams=entry.beams,
            length_penalty=entry.length_penalty,
        )
        if unreadable:  # of this process's rows; they were evaluated as grey images
            yield "unreadable_images", float(len(unreadable))
        right = [_plain(caption) in map(_plain, wanted) for caption, wanted in zip(found, self._wanted, strict=True)]
        yield "exact_match", float(np.mean(right))
        if entry.contact_sheet and picture is not None:
            chosen = np.linspace(0, len(found) - 1, min(SHEET, len(found))).astype(int)
            images = evaluation_images(self._source, contact_sheet.TILE, "squash", chosen)[0]
            contact_sheet.draw_captions(
                picture, images, [(found[row], right[row], self._wanted[row][0]) for row in chosen]
            )


def _plain(caption: str) -> str:
    return " ".join(caption.casefold().split())
