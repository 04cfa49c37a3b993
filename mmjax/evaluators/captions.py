"""Captioning of held-out images: how close the captions are to the image's own, and how likely its own ones are."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mmjax.api import Model
from mmjax.data.image_reader import Reader
from mmjax.data.pipeline import captions_of, evaluation_images
from mmjax.data.sources import open_entry
from mmjax.evaluators import caption_metrics, contact_sheet
from mmjax.evaluators.images import Images, unreadable

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
        """Yields the metrics; draws a contact sheet where the entry asks for one.

        `exact_match` is the share of captions that are one of the image's own, up to case and spaces. `BLEU-1` to
        `BLEU-4`, `ROUGE-L` and `CIDEr-D` are those of `caption_metrics`, `bits_per_byte` that of `bits_per_byte`.
        """
        entry, load_images = self._entry, Images(self._source, model)
        found = model.caption_rows(
            len(self._wanted),
            load_images,
            batch_size=entry.batch_size,
            beams=entry.beams,
            length_penalty=entry.length_penalty,
        )
        yield from unreadable(load_images)
        right = [plain(caption) in map(plain, wanted) for caption, wanted in zip(found, self._wanted, strict=True)]
        yield "exact_match", float(np.mean(right))
        yield from _overlap(found, self._wanted)
        yield "bits_per_byte", bits_per_byte(model, self._wanted, load_images, entry.batch_size)
        if entry.contact_sheet and picture is not None:
            chosen = np.linspace(0, len(found) - 1, min(SHEET, len(found))).astype(int)
            images = evaluation_images(self._source, Reader(contact_sheet.TILE), chosen)[0]
            contact_sheet.draw_captions(
                picture, images, [(found[row], right[row], self._wanted[row][0]) for row in chosen]
            )


def bits_per_byte(
    model: Model,
    captions: Sequence[Sequence[str]],
    load_images: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
) -> float:
    """How well the decoder predicts captions, as -log2 of their probability over their bytes: less is better.

    Counted are the tokens that the model reads of a caption, the end token included, and the bytes of the text that
    they stand for (`Tokenizer.decode`, in UTF-8): what is cut off adds to neither. So figures of models with different
    tokenizers compare as far as these read the same text.

    Args:
      model: with a decoder.
      captions: of each image.
      load_images: numbers of images -> their pixels.
      batch_size: of images, and of captions.
    """
    ids = model.tokenizer.encode(
        [caption for own in captions for caption in own], model.config.model.encoders.text.length
    )
    images = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    likelihoods = model.caption_likelihood_rows(
        images, np.arange(len(ids)), load_images, lambda rows: ids[rows], batch_size
    )
    size = sum(len(model.tokenizer.decode(row).encode()) for row in ids)
    return float(-likelihoods.sum(dtype=np.float64) / np.log(2) / max(size, 1))


def _overlap(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> Iterator[tuple[str, float]]:
    captions = list(map(caption_metrics.tokenize, found))
    references = [list(map(caption_metrics.tokenize, own)) for own in wanted]
    for order, value in enumerate(caption_metrics.bleu(captions, references), 1):
        yield f"BLEU-{order}", value
    yield "ROUGE-L", float(caption_metrics.rouge_l(captions, references).mean())
    yield "CIDEr-D", float(caption_metrics.cider_d(captions, references).mean())


def plain(caption: str) -> str:
    """The same for captions that differ in case and spaces alone."""
    return " ".join(caption.casefold().split())
