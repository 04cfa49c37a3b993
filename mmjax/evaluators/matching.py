"""Matching of held-out images and captions: does the matching head tell an image's own caption from a wrong one?"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from mmjax.api import Model
from mmjax.data.pipeline import captions_of
from mmjax.data.sources import open_entry
from mmjax.errors import UserError
from mmjax.evaluators.captions import plain
from mmjax.evaluators.images import Images, identity, unreadable
from mmjax.evaluators.ranking import best

HARD = 10  # of so many texts that the contrastive embeddings find most similar, hard ones are drawn


class Matching:
    """The evaluator `matching`; its fields are those of `mmjax.config.matching`.

    Records with the same image share their captions, and texts are the same up to case and spaces.
    """

    def __init__(self, entry: ConfigDict):
        self._entry = entry

    @cached_property
    def _source(self):
        return open_entry(self._entry)

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """Opens the data and checks it.

        Raises:
          UserError: it is missing, a record lacks captions, or every caption is one of some image's own.
        """
        images: dict[bytes, int] = {}
        texts: dict[str, int] = {}
        self._records, self._texts, self._own = [], [], []
        images_of, texts_of = [], []
        for index in range(len(self._source)):
            record = self._source[index]
            image = images.setdefault(identity(record), len(images))
            if image == len(self._own):
                self._records.append(index)
                self._own.append(set())
            for caption in captions_of(record, self._entry.captions):
                text = texts.setdefault(plain(caption), len(texts))
                if text == len(self._texts):
                    self._texts.append(caption)
                if text not in self._own[image]:
                    self._own[image].add(text)
                    images_of.append(image)
                    texts_of.append(text)
            beat()
        self._pairs = np.array(images_of), np.array(texts_of)
        for image, own in enumerate(self._own):
            if len(own) == len(texts):
                key = self._source[self._records[image]]["key"]
                raise UserError(f"there is no wrong caption for the image of record {key!r}: it has all {len(texts)}")

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields `matching_accuracy` and `matching_auc` of each image with its own captions and as many wrong ones.

        Accuracy is the share of right answers where a probability above 0.5 says that a text belongs to an image; 0.5
        is chance. `matching_auc` is the area under the ROC curve of the log-odds.
        """
        entry, places = self._entry, np.array(self._records)
        load_images = Images(self._source, model, places)
        ids = model.tokenizer.encode(self._texts, model.config.model.encoders.text.length)

        def load_texts(rows: np.ndarray) -> np.ndarray:
            return ids[rows]

        images, texts = self._pairs
        nearest = None
        if entry.hard:
            found = model.encode_rows("image", len(places), load_images, entry.batch_size)
            count = min(HARD + max(map(len, self._own)), len(ids))
            texts_found = model.encode_rows("text", len(ids), load_texts, entry.batch_size)
            nearest = model.agreed(best(found, texts_found, count))
        wrong = wrong_texts(images, texts, self._own, entry.seed, nearest)
        odds = model.match_rows(
            np.tile(images, 2), np.concatenate([texts, wrong]), load_images, load_texts, entry.batch_size
        )
        yield from unreadable(load_images)
        belongs = np.arange(len(odds)) < len(images)
        yield "matching_accuracy", float(np.where(belongs, odds > 0, odds <= 0).mean())
        yield "matching_auc", area_under_roc(odds, belongs)


def wrong_texts(
    images: Int[np.ndarray, " pairs"],
    texts: Int[np.ndarray, " pairs"],
    own: list[set[int]],
    seed: int,
    nearest: Int[np.ndarray, "images count"] | None = None,
) -> Int[np.ndarray, " pairs"]:
    """A text for each pair's image that is none of its own; the same for the same seed.

    It is that of another pair, so texts are as frequent among wrong ones as among right ones. With `nearest` it is one
    of the image's first 10 texts there that are not its own.

    Args:
      images: the image of each pair.
      texts: its text.
      own: the texts of each image, never all there are.
      seed: of drawing.
      nearest: of each image the most similar texts, best first; enough to have one that is not its own.
    """
    rng, wrong = np.random.default_rng(seed), np.zeros_like(texts)
    for pair, image in enumerate(images):
        if nearest is None:
            drawn = texts[rng.integers(len(texts))]
            while drawn in own[image]:
                drawn = texts[rng.integers(len(texts))]
        else:
            drawn = rng.choice([text for text in nearest[image] if text not in own[image]][:HARD])
        wrong[pair] = drawn
    return wrong


def area_under_roc(scores: Float[np.ndarray, " rows"], belongs: Bool[np.ndarray, " rows"]) -> float:
    """The probability that a row that belongs scores higher than one that does not; a tie counts half.

    This is the area under the ROC curve ("The Meaning and Use of the Area under a ROC Curve", Hanley & McNeil 1982).
    A score that is NaN counts against the model. There have to be rows of both sorts.
    """
    against = np.where(belongs, -np.inf, np.inf)
    _, places = np.unique(np.where(np.isnan(scores), against, scores), return_inverse=True)
    right, wrong = (np.bincount(places[of], minlength=places.max() + 1) for of in (belongs, ~belongs))
    below = np.cumsum(wrong) - wrong
    return float((right * (below + wrong / 2)).sum() / (right.sum() * wrong.sum()))
