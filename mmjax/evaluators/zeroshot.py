"""Zero-shot classification: the class whose name, put into sentences, is most similar to the image.

After "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al. 2021), section 3.1.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from mmjax.api import Model
from mmjax.data.pipeline import NoCaption, captions_of
from mmjax.data.sources import open_entry
from mmjax.errors import UserError, one_line
from mmjax.evaluators import calibration, confusion_matrix, recalls
from mmjax.evaluators.images import Images, unreadable
from mmjax.evaluators.ranking import CHUNK, best, ranks

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")
PROMPTS = 8192  # encoded, and held, at a time
_PLACE_OF_NAME = re.compile(r"\{c?\}")


class ZeroShot:
    """The evaluator `zeroshot`; its fields are those of `mmjax.config.zeroshot`.

    With a file of `classes`, a record's class is the line that its label numbers, from 0; where it has no label, or
    `captions` are named, the line that its caption repeats. Without such a file the caption is the name of the class.
    """

    def __init__(self, entry: ConfigDict):
        self._entry = entry

    @cached_property
    def _source(self):
        return open_entry(self._entry)

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """Opens the data and checks it.

        Raises:
          UserError: it is missing; a file cannot be read, or has an empty line or a template without a place for the
            name; a record's class cannot be told; or there is only one.
        """
        entry = self._entry
        self._templates = read_templates(entry.templates) if entry.templates else TEMPLATES
        self._classes = read_lines("classes", entry.classes) if entry.classes else []
        numbers = {}
        for number, name in enumerate(self._classes):
            numbers.setdefault(name, number)
        source, labels = open_entry(entry, images=False), []
        for index in range(len(source)):
            labels.append(self._class_of(source[index], numbers))
            beat()
        self._labels, self._classes = np.array(labels), self._classes or [*numbers]
        if len(set(self._classes)) < 2:
            raise UserError(f"there is the one class {self._classes[0]!r}: nothing to tell apart")

    def _class_of(self, record: dict, numbers: dict[str, int]) -> int:
        """The number of a record's class; without a file of classes, a new name gets the next one."""
        listed, key, label = len(self._classes), record["key"], record["label"]
        if listed and label >= 0 and not self._entry.captions:
            if label >= listed:
                raise UserError(f"record {key!r} is of class {label}, and {self._entry.classes} has {listed} lines")
            return label
        try:
            names = sorted({*captions_of(record, self._entry.captions)})
        except NoCaption as error:
            remedy = "nor a label" if listed else "set classes to a file with the name of each label"
            raise UserError(f"{error}, to name its class; {remedy}") from error
        if len(names) > 1:
            raise UserError(f"record {key!r} has {len(names)} captions, and no one of them is its class: {names[:3]}")
        if listed and names[0] not in numbers:
            raise UserError(f'record {key!r} is of class "{names[0]}", which is no line of {self._entry.classes}')
        return numbers.setdefault(names[0], len(numbers))

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields `zeroshot_top1`, `zeroshot_top5`, `mean_per_class_recall` and `expected_calibration_error`.

        `mean_per_class_recall` is the mean of the classes' own top-1 accuracies, over the classes that have images.
        With five classes or fewer all would be among the first five, and there is no `zeroshot_top5`. With a picture's
        path it writes each class's recall beside it (.csv), and draws what the entry asks for.
        """
        entry, load_images = self._entry, Images(self._source, model)
        images = model.encode_rows("image", len(self._labels), load_images, entry.batch_size)
        yield from unreadable(load_images)
        classes = class_embeddings(model, self._classes, self._templates, entry.batch_size)
        found = class_ranks(images, classes, self._labels, self._classes)
        yield "zeroshot_top1", float((found < 1).mean())
        if len(classes) > 5:
            yield "zeroshot_top5", float((found < 5).mean())
        yield "mean_per_class_recall", mean_per_class_recall(self._labels, found == 0)
        sure = confidences(images, classes, model.logits()["logit_scale"])
        bins = calibration.binned(sure, found == 0, entry.calibration_bins)
        yield "expected_calibration_error", bins.error
        if picture is None:
            return
        recalls.write(picture.with_suffix(".csv"), self._classes, self._labels, found == 0)
        if entry.confusion_matrix:
            named = predictions(images, classes, self._labels, found)
            confusion_matrix.draw(picture, self._classes, self._labels, named)
        if entry.reliability_diagram:
            calibration.draw(picture.with_name(f"reliability-{picture.name}"), bins)


def class_embeddings(
    model: Model, classes: Sequence[str], templates: Sequence[str], batch_size: int
) -> Float[np.ndarray, "classes embed_dim"]:
    """One embedding of unit norm for each class: the mean of its name's embeddings in all templates, normalised again.

    This is CLIP's prompt ensembling in the space of embeddings (Radford et al. 2021, section 3.1.4). `templates` have
    {} or {c} where the name goes; PROMPTS sentences are encoded at a time.
    """

    def encode(names: Sequence[str]) -> np.ndarray:
        prompts = [fill(template, name) for name in names for template in templates]
        ids = model.tokenizer.encode(prompts, model.config.model.encoders.text.length)
        embeddings = model.encode_rows("text", len(prompts), lambda rows: ids[rows], batch_size)
        means = embeddings.reshape(len(names), len(templates), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    size = max(1, PROMPTS // len(templates))
    return np.concatenate([encode(classes[start : start + size]) for start in range(0, len(classes), size)])


def fill(template: str, name: str) -> str:
    """The template with the name for every {} and {c}."""
    return _PLACE_OF_NAME.sub(lambda _: name, template)


def class_ranks(
    images: Float[np.ndarray, "images dim"],
    classes: Float[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " images"],
    names: Sequence[str],
) -> Int[np.ndarray, " images"]:
    """The rank (0 is first) of each image's class; ties count against the model, as in `ranking.ranks`.

    Only classes of the same name, which nothing can tell apart, come in their own order.
    """
    numbers: dict[str, int] = {}
    owners = np.array([numbers.setdefault(name, len(numbers)) for name in names])
    order = np.argsort(owners, kind="stable")
    before = np.empty_like(owners)  # how many classes of the same name stand before a class
    before[order] = np.arange(len(names)) - np.searchsorted(owners[order], owners[order])
    return ranks(images, classes, owners[labels], owners) + before[labels]


def mean_per_class_recall(labels: Int[np.ndarray, " images"], right: np.ndarray) -> float:
    """The mean over the classes that have images of the share of their images that are right (balanced accuracy)."""
    sizes = np.bincount(labels)
    return float((np.bincount(labels, right)[sizes > 0] / sizes[sizes > 0]).mean())


def confidences(
    images: Float[np.ndarray, "images dim"], classes: Float[np.ndarray, "classes dim"], logit_scale: float
) -> Float[np.ndarray, " images"]:
    """The probability of the class that each image is taken for: softmax over the classes of scale times cosine.

    A model trained with softmax says just that (`Model.similarity`). One trained with the sigmoid loss gives each pair
    a probability p of its own; given that exactly one of the classes is right, a class's share of the odds p / (1 - p)
    is its probability, and that is the same softmax: the bias is in all odds, and cancels.
    """
    parts = (images[start : start + CHUNK] @ classes.T for start in range(0, len(images), CHUNK))
    return np.concatenate([calibration.confidences(logit_scale * part) for part in parts])


def predictions(
    images: Float[np.ndarray, "images dim"],
    classes: Float[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " images"],
    found: Int[np.ndarray, " images"],
) -> Int[np.ndarray, " images"]:
    """The class that each image is taken for: its own where `found`, its rank, is 0, else the best other one."""
    first = best(images, classes, 2)
    other = np.where(first[:, 0] == labels, first[:, -1], first[:, 0])
    return np.where(found == 0, labels, other)


def read_lines(key: str, path: str) -> list[str]:
    """The lines of a UTF-8 text file, without white space around them.

    Raises:
      UserError: it cannot be read, has no line, or an empty one before the end; the message names `key`.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {path}: {one_line(error)}") from error
    stripped = [line.strip() for line in lines]
    if "" in stripped:
        raise UserError(f"{key}: line {stripped.index('') + 1} of {path} is empty")
    return stripped


def read_templates(path: str) -> list[str]:
    """The templates in a file, one a line.

    Raises:
      UserError: as `read_lines`, or a line has neither {} nor {c}.
    """
    templates = read_lines("templates", path)
    for number, template in enumerate(templates, start=1):
        if not _PLACE_OF_NAME.search(template):
            raise UserError(f"templates: line {number} of {path} has no {{}} or {{c}} for the name: {template[:80]!r}")
    return templates
