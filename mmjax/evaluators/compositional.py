"""Compositional understanding: is an image closer to its caption than to one whose words or roles are swapped?

An image with a caption and a foil: SugarCrepe (Hsieh et al. 2023), ARO (Yuksekgonul et al. 2023), VALSE (Parcalabescu
et al. 2022). Two images with two captions of the same words: Winoground (Thrush et al. 2022).
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from mmjax import files
from mmjax.api import Model
from mmjax.data import image as image_ops
from mmjax.data.image_reader import GREY, Reader, Rows
from mmjax.errors import RecordError, UserError, one_line

# What fields are called, here and in the files of these benchmarks.
IMAGE = ("image", "image_path", "image_file", "filename")
CAPTION = ("caption", "true_caption")
FOIL = ("foil", "negative_caption", "false_caption")
CATEGORY = ("category", "tag", "linguistic_phenomena", "relation_name")
_FOUR = ("image_0", "image_1", "caption_0", "caption_1")
SCORES = ("text_score", "image_score", "group_score")


class Item(NamedTuple):
    """A record: an image with a caption and a foil, or two images with a caption each."""

    images: tuple[str, ...]
    captions: tuple[str, str]
    category: str


class Compositional:
    """The evaluator `compositional`; its fields are those of `mmjax.config.compositional`."""

    def __init__(self, entry: ConfigDict):
        self._entry = entry

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """Reads the file and looks for its images.

        Raises:
          UserError: the file or an image is missing, or a record lacks a field; the message names the line of a
            `.jsonl` file, or the record of a `.json` file.
        """
        if not self._entry.source:
            raise UserError("source is empty; it has to name a .jsonl or .json file")
        path = Path(self._entry.source).expanduser()
        root = Path(self._entry.root).expanduser() if self._entry.root else path.parent
        self._root, self._items = str(root), []
        for where, raw in _read(path):
            item = _item(raw, where)
            for name in item.images:
                self._check_image(name, where)
            self._items.append(item)
            beat()
        if not self._items:
            raise UserError(f"{path} holds no record")

    def _check_image(self, name: str, where: str) -> None:
        try:
            path = files.path_inside(self._root, name)
        except RecordError as error:
            raise UserError(f"{where}: {error}") from error
        if not Path(path).is_file():
            raise UserError(f"{where}: no image {name!r} in {self._root}")

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields `accuracy` of records with a foil, and `text_score`, `image_score` and `group_score` of those with two
        images, over all of them and for each category (`accuracy_CATEGORY`). A tie counts against the model.
        """
        items, unreadable = self._items, {}
        pairs = [(image, caption) for item in items for image in item.images for caption in item.captions]
        scores = self._scores(model, pairs, unreadable)
        if unreadable:  # of this process's rows; they were evaluated as grey images
            yield "unreadable_images", float(len(unreadable))
        sizes = np.array([2 * len(item.images) for item in items])
        starts = np.cumsum(sizes) - sizes
        categories = np.array([item.category for item in items])
        for size, names, judge in ((2, ("accuracy",), above_foil), (4, SCORES, winoground)):
            chosen = sizes == size
            if not chosen.any():
                continue
            right = judge(scores[starts[chosen, None] + np.arange(size)].reshape(-1, size // 2, 2))
            for name, values in zip(names, right, strict=True):
                yield name, float(values.mean())
                for category in sorted({*categories[chosen]} - {""}):
                    yield f"{name}_{category}", float(values[categories[chosen] == category].mean())

    def _scores(
        self, model: Model, pairs: list[tuple[str, str]], unreadable: dict[str, None]
    ) -> Float[np.ndarray, " pairs"]:
        """How similar each image and text are; every image and text is encoded once."""
        entry, reader = self._entry, Reader.of(model.config.model.encoders.image)
        names, texts = (list(dict.fromkeys(column)) for column in zip(*pairs, strict=True))

        def decode(name: str) -> image_ops.Pixels:
            try:
                return image_ops.decode(files.read_inside(self._root, name))
            except RecordError:
                unreadable[name] = None
                return GREY

        def load_images(rows: np.ndarray) -> Rows:
            return reader(decode(names[row]) for row in rows)

        ids = model.tokenizer.encode(texts, model.config.model.encoders.text.length)

        def load_texts(rows: np.ndarray) -> np.ndarray:
            return ids[rows]

        numbers = [{each: number for number, each in enumerate(known)} for known in (names, texts)]
        rows, columns = np.array([[numbers[0][name], numbers[1][text]] for name, text in pairs]).T
        if entry.by == "matching":
            return model.match_rows(rows, columns, load_images, load_texts, entry.batch_size)
        images = model.encode_rows("image", len(names), load_images, entry.batch_size)
        return (images[rows] * model.encode_rows("text", len(ids), load_texts, entry.batch_size)[columns]).sum(axis=1)


def above_foil(scores: Float[np.ndarray, "records 1 2"]) -> tuple[np.ndarray]:
    """Whether the image's score with its caption is above that with the foil."""
    return (scores[:, 0, 0] > scores[:, 0, 1],)


def winoground(scores: Float[np.ndarray, "records 2 2"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text, image and group score of records ("Winoground", Thrush et al. 2022, section 3): each right or not.

    Args:
      scores: of images (rows) with captions (columns); the diagonal belongs together.
    """
    own = np.diagonal(scores, axis1=1, axis2=2)
    text = (own > scores[:, (0, 1), (1, 0)]).all(axis=1)  # for each image the right caption
    image = (own > scores[:, (1, 0), (0, 1)]).all(axis=1)  # for each caption the right image
    return text, image, text & image


def _read(path: Path) -> Iterator[tuple[str, object]]:
    """The records of a file, each with where it stands."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8: {one_line(error)}") from error
    if path.suffix != ".json":
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")
        return
    whole = _parse(content, str(path))
    if not isinstance(whole, dict | list):
        raise UserError(f"{path} holds neither a list nor an object of records")
    for key, raw in whole.items() if isinstance(whole, dict) else enumerate(whole):
        yield f"{path}, record {key}", raw


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {one_line(error)}") from error


def _item(raw: object, where: str) -> Item:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: no JSON object but {type(raw).__name__}")
    category = next((str(raw[name]) for name in CATEGORY if raw.get(name) is not None), "")
    category = re.sub(r"[^\w.-]+", "_", category).strip("_")
    if any(name in raw for name in _FOUR):
        first, second, *captions = (_text(raw, (name,), where) for name in _FOUR)
        return Item((first, second), tuple(captions), category)
    return Item((_text(raw, IMAGE, where),), (_text(raw, CAPTION, where), _text(raw, FOIL, where)), category)


def _text(raw: dict, names: tuple[str, ...], where: str) -> str:
    """The first of these fields that is there."""
    name = next((name for name in names if name in raw), None)
    if name is None:
        raise UserError(f"{where}: no {' or '.join(names)}; it has: {', '.join(raw)[:200] or 'nothing'}")
    if not isinstance(raw[name], str) or not raw[name].strip():
        raise UserError(f"{where}: {name} is no text but {str(raw[name])[:50]!r}")
    return raw[name]
