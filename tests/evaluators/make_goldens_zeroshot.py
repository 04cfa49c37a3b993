"""Writes what scikit-learn makes of random similarities: accuracies, and average precision of searches.

    python -m tests.evaluators.make_goldens_zeroshot

Needs scikit-learn. Embeddings come from numpy's seeds and are not kept.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("goldens_zeroshot.json")
TOP = 10
# (seed, images, classes): labels are skewed, and some classes may have no image.
CLASSIFICATIONS = {"few": (1, 150, 7), "many": (2, 400, 90)}
# (seed, queries, items, owners). With ten items all own ones are among the first ten; with three owners there are more
# than ten own ones.
SEARCHES = {"ten": (3, 40, 10, 4), "some": (4, 60, 50, 15), "plenty": (5, 30, 90, 3)}


def classification(seed: int, images: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of images and of classes, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.2 if classes < 10 else 0.05, images), classes) - 1
    names = unit(rng.normal(size=(classes, 16)))
    return unit(names[labels] + 0.5 * rng.normal(size=(images, 16))), names, labels


def search(seed: int, queries: int, items: int, owners: int) -> tuple[np.ndarray, ...]:
    """Embeddings of queries and of items, and the owners of both; every owner has an item."""
    rng = np.random.default_rng(seed)
    item_owners = rng.permutation(np.append(np.arange(owners), rng.integers(0, owners, items - owners)))
    query_owners, centres = rng.integers(0, owners, queries), rng.normal(size=(owners, 16))
    found = [unit(centres[each] + 1.2 * rng.normal(size=(len(each), 16))) for each in (query_owners, item_owners)]
    return *found, query_owners, item_owners


def unit(rows: np.ndarray) -> np.ndarray:
    """The rows as float32 of unit norm."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    """Writes `goldens_zeroshot.json`."""
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

    goldens = {"made_with": {"scikit-learn": importlib.metadata.version("scikit-learn")}}
    for name, arguments in CLASSIFICATIONS.items():
        images, classes, labels = classification(*arguments)
        scores = images.astype(np.float64) @ classes.T.astype(np.float64)
        every = np.arange(len(classes))
        goldens[name] = {
            "zeroshot_top1": float(top_k_accuracy_score(labels, scores, k=1, labels=every)),
            "zeroshot_top5": float(top_k_accuracy_score(labels, scores, k=5, labels=every)),
            "mean_per_class_recall": float(balanced_accuracy_score(labels, scores.argmax(axis=1))),
        }
    for name, arguments in SEARCHES.items():
        queries, items, query_owners, item_owners = search(*arguments)
        scores = queries.astype(np.float64) @ items.T.astype(np.float64)
        precisions = []
        for line, owner in zip(scores, query_owners, strict=True):
            first, own = np.argsort(-line)[:TOP], item_owners == owner
            # scikit-learn divides by the own items that it is shown.
            shown = average_precision_score(own[first], line[first]) * own[first].sum() if own[first].any() else 0.0
            precisions.append(float(shown / min(TOP, own.sum())))
        goldens[name] = precisions
    PATH.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()
