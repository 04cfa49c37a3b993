"""How many images of each class are right, as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int


def write(path: Path, names: Sequence[str | int], labels: Int[np.ndarray, " images"], right: np.ndarray) -> None:
    """Writes a CSV file (UTF-8) with the columns class, images, recall: a row for each class that has images.

    Args:
      path: where; the folder is made.
      names: of all classes, or their labels.
      labels: the class of each image, a place among the names.
      right: which images are right.
    """
    sizes, found = np.bincount(labels), np.bincount(labels, right)
    there = np.flatnonzero(sizes)
    recalls = found[there] / sizes[there]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "images", "recall"))
        writer.writerows(zip((names[number] for number in there), sizes[there], recalls.tolist(), strict=True))
