"""A picture of what images of each class were taken for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont

from mmjax.evaluators.contact_sheet import GAP, INK, PAPER, RIGHT, WRONG, shortened

MOST = 20
AXES = "rows: what they are; columns: what they were taken for"
CELL, NAME, LINE, GRID = 34, 260, 22, (222, 222, 222)


def draw(
    path: Path, names: Sequence[str], labels: Int[np.ndarray, " images"], predicted: Int[np.ndarray, " images"]
) -> None:
    """Draws the matrix as PNG: a row for what images are, a column for what they were taken for.

    Of more than MOST classes those are drawn that are confused most often, with a column "other" for the rest.

    Args:
      path: where; the folder is made.
      names: of all classes.
      labels: the class of each image.
      predicted: what it was taken for.
    """
    shown = most_confused(labels, predicted, len(names))
    places = np.full(len(names), len(shown))
    places[shown] = np.arange(len(shown))
    ours = places[labels] < len(shown)
    counts = np.zeros((len(shown), len(shown) + 1), int)
    np.add.at(counts, (places[labels[ours]], places[predicted[ours]]), 1)
    columns = [names[number] for number in shown] + ["other"] * (len(shown) < len(names))
    title = f"{len(labels):,} images of {len(names):,} classes, {np.mean(labels == predicted):.1%} right"
    if len(shown) < len(names):
        title += f"; the {len(shown)} most confused classes"
    sheet = _draw(counts[:, : len(columns)], columns, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def most_confused(
    labels: Int[np.ndarray, " images"], predicted: Int[np.ndarray, " images"], classes: int
) -> Int[np.ndarray, " shown"]:
    """At most MOST classes: all if they are so few; else both of each pair, beginning with the most frequent error."""
    if classes <= MOST:
        return np.arange(classes)
    wrong = labels != predicted
    errors, times = np.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    errors = errors[np.argsort(-times, kind="stable")]
    in_turn = np.stack([errors // classes, errors % classes], axis=1).ravel()
    return np.array([*dict.fromkeys(np.concatenate([in_turn, labels]).tolist())][:MOST])


def _draw(counts: Int[np.ndarray, "rows columns"], columns: Sequence[str], title: str) -> Image.Image:
    """The sheet: names at the left and, turned, above; the more of its row a cell has, the darker it is."""
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    names = [shortened(name, font, NAME) for name in columns]
    side = max(CELL, int(small.getlength(f"{counts.max():,}")) + 8)
    longest = int(max(map(font.getlength, names))) + GAP
    left, top = GAP + longest, GAP + 2 * LINE + longest
    width = max(left + side * len(columns), *(GAP + int(font.getlength(text)) for text in (title, AXES))) + GAP
    sheet = Image.new("RGB", (width, top + side * len(counts) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, INK, font)
    pen.text((GAP, GAP + LINE), AXES, INK, font)
    for column, name in enumerate(names):
        turned = Image.new("RGB", (longest, LINE), PAPER)
        ImageDraw.Draw(turned).text((0, 2), name, INK, font)
        sheet.paste(turned.rotate(90, expand=True), (left + column * side + (side - LINE) // 2, top - longest - 4))
    for row, line in enumerate(counts):
        middle = top + row * side + side // 2
        pen.text((left - 8, middle), names[row], INK, font, anchor="rm")
        for column, count in enumerate(line):
            share = (count / max(line.sum(), 1)) ** 0.5  # few errors should be seen too
            corner = (left + column * side, top + row * side)
            pen.rectangle((*corner, corner[0] + side, corner[1] + side), _shade(share, row == column), GRID)
            if count:
                ink = PAPER if share > 0.7 else INK
                pen.text((corner[0] + side // 2, middle), f"{count:,}", ink, small, anchor="mm")
    return sheet


def _shade(share: float, right: bool) -> tuple[int, ...]:
    return tuple(
        round(paper + share * (full - paper)) for paper, full in zip(PAPER, RIGHT if right else WRONG, strict=True)
    )
