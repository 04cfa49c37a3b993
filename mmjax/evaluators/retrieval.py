"""Image-text retrieval, both ways: recall at 1, 5 and 10, mean average precision at 10, median and mean rank."""

from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from mmjax.api import Model
from mmjax.data.image_reader import Reader
from mmjax.data.pipeline import captions_of, evaluation_images
from mmjax.data.sources import Source, open_entry
from mmjax.errors import UserError
from mmjax.evaluators import contact_sheet
from mmjax.evaluators.images import Images, identity, unreadable
from mmjax.evaluators.ranking import TOP, average_precision, best, reranked, rivals

RECALLS = (1, 5, 10)
DIRECTIONS = {
    "text_to_image": "image_retrieval",
    "image_to_text": "text_retrieval",
}  # and what CLIP_benchmark calls them
SHEET_ROWS, SHEET_COLUMNS = 6, 5


class Retrieval:
    """The evaluator `retrieval`; its fields are those of `mmjax.config.retrieval`.

    The captions of `split` search the images of `split` and, where `gallery_split` names another
    one, the images of that instead; then only this direction is reported.
    """

    def __init__(self, entry: ConfigDict):
        self._entry, self._beat = entry, lambda: None

    @cached_property
    def _queries(self):
        return open_entry(self._entry)

    @cached_property
    def _gallery(self):
        split = self._entry.gallery_split
        return open_entry(self._entry.to_dict() | {"split": split}) if split else self._queries

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """Opens the data and checks it.

        Raises:
          UserError: it is missing, a record lacks captions, or the gallery lacks an image of the captions.
        """
        self._beat = beat
        missing = [key for image, key in self._captions[1] if image not in self._images]
        if missing:
            raise UserError(
                f'split "{self._entry.gallery_split}" lacks {len(missing)} images of split "{self._entry.split}": '
                f"{missing[0]}, ..."
            )

    @cached_property
    def _captions(self) -> tuple[list[str], list[tuple[Hashable, str]]]:
        """All captions, and for each the image that it belongs to and the key of its record."""
        captions, owners = [], []
        for key, image, texts in self._read:
            captions += texts
            owners += [(image, key)] * len(texts)
        return captions, owners

    @cached_property
    def _images(self) -> dict[Hashable, int]:
        """What tells each image of the gallery from the others, and the number of the first record that has it."""
        found: dict[Hashable, int] = {}
        if self._gallery is self._queries:
            named = [(key, image) for key, image, _ in self._read]
        else:
            named = [(record["key"], self._identity(record)) for record in self._records(self._gallery)]
        for index, (key, image) in enumerate(named):
            if found.setdefault(image, index) != index and self._entry.match == "record":
                raise UserError(f'several records have the key {key!r}: set match to "image"')
        return found

    @cached_property
    def _read(self) -> list[tuple[str, Hashable, list[str]]]:
        """Of each record of `split`, read once: its key, what tells its image from others, and its captions."""
        return [
            (record["key"], self._identity(record), captions_of(record, self._entry.captions))
            for record in self._records(self._queries)
        ]

    def _records(self, source: Source) -> Iterator[dict]:
        for index in range(len(source)):
            yield source[index]
            self._beat()

    def _identity(self, record: dict) -> Hashable:
        return record["key"] if self._entry.match == "record" else identity(record)

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields the metrics; draws a contact sheet where the entry asks for one."""
        entry, gallery = self._entry, np.array(list(self._images.values()))
        captions, owners = self._captions
        load_images = Images(self._gallery, model, gallery)
        ids = model.tokenizer.encode(captions, model.config.model.encoders.text.length)
        texts = model.encode_rows("text", len(captions), lambda rows: ids[rows], entry.batch_size)
        images = model.encode_rows("image", len(gallery), load_images, entry.batch_size)
        yield from unreadable(load_images)
        numbers = {image: number for number, image in enumerate(self._images)}
        text_owners = np.array([numbers[image] for image, _ in owners])
        image_owners = np.arange(len(gallery))
        searched = rivals(texts, images, text_owners, image_owners, both=not entry.gallery_split)
        found = {name: before[:, 0] for name, before in zip(DIRECTIONS, searched, strict=True) if before.size}
        for direction, before in zip(found, searched, strict=False):
            yield from summary(direction, before)
        if entry.rerank:
            yield from self._reranked(model, texts, images, text_owners, load_images, ids, found)
        if entry.contact_sheet and picture is not None:
            chosen = np.linspace(0, len(captions) - 1, min(SHEET_ROWS, len(captions))).astype(int)
            shown = best(texts[chosen], images, SHEET_COLUMNS)
            contact_sheet.draw(
                picture,
                [captions[row] for row in chosen],
                [evaluation_images(self._gallery, Reader(contact_sheet.TILE), gallery[row])[0] for row in shown],
                [[int(index) == text_owners[row] for index in line] for row, line in zip(chosen, shown, strict=True)],
            )

    def _reranked(
        self,
        model: Model,
        texts: Float[np.ndarray, "texts dim"],
        images: Float[np.ndarray, "images dim"],
        text_owners: Int[np.ndarray, " texts"],
        load_images: Callable[[np.ndarray], np.ndarray],
        ids: Int[np.ndarray, "texts length"],
        found: dict[str, Int[np.ndarray, " queries"]],
    ) -> Iterator[tuple[str, float]]:
        """The metrics after the first `rerank` of each query are put into a new order: by the sum of the contrastive
        logit and `rerank_weight` of the matching head's log-odds (as "BLIP", Li et al. 2022, adds the two). `found` are
        the ranks before that, by direction.
        """
        count, size = min(self._entry.rerank, len(images)), self._entry.batch_size
        scale, weight = model.logits()["logit_scale"], self._entry.rerank_weight

        def match(image_rows: np.ndarray, text_rows: np.ndarray) -> np.ndarray:
            odds = model.match_rows(image_rows.ravel(), text_rows.ravel(), load_images, lambda rows: ids[rows], size)
            cosines = (images[image_rows] * texts[text_rows]).sum(axis=-1)
            return weight * odds.reshape(image_rows.shape) + scale * cosines

        first = model.agreed(best(texts, images, count))
        scores = match(first, np.broadcast_to(np.arange(len(texts))[:, None], first.shape))
        places = reranked(found["text_to_image"], scores, first == text_owners[:, None])
        yield from _summary("text_to_image_reranked", places)
        if "image_to_text" in found:
            first = model.agreed(best(images, texts, min(count, len(texts))))
            scores = match(np.broadcast_to(np.arange(len(images))[:, None], first.shape), first)
            right = text_owners[first] == np.arange(len(images))[:, None]
            yield from _summary("image_to_text_reranked", reranked(found["image_to_text"], scores, right))


def summary(direction: str, rivals: Int[np.ndarray, "queries own"]) -> Iterator[tuple[str, float]]:
    """The metrics of one direction, from `ranking.rivals` of 10 own items.

    A query counts for R@k where any of its own items is among the first k. CLIP_benchmark's `image_retrieval_recall@5`
    (texts search images) and `text_retrieval_recall@5` are defined in the same way, except that ties fall as they may:
    they are other names of R@5. mAP@10 is the mean over queries of `ranking.average_precision`.
    """
    places = rivals[:, 0]
    yield from _summary(direction, places)
    yield f"{direction}_mAP@{TOP}", float(average_precision(rivals).mean())
    yield f"{DIRECTIONS[direction]}_recall@5", float((places < 5).mean())


def _summary(direction: str, found: Int[np.ndarray, " queries"]) -> Iterator[tuple[str, float]]:
    for k in RECALLS:
        yield f"{direction}_R@{k}", float((found < k).mean())
    yield f"{direction}_median_rank", float(np.median(found) + 1)
    yield f"{direction}_mean_rank", float(found.mean() + 1)
