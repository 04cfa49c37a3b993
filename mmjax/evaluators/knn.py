"""The class of an image by a weighted vote of its nearest neighbours among the training images."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mmjax.api import Model
from mmjax.errors import UserError
from mmjax.evaluators import recalls
from mmjax.evaluators.labelled import Labelled, correct, place

QUERIES, GALLERY = 1024, 65_536  # compared at a time


class Knn(Labelled):
    """The evaluator `knn`; its fields are those of `mmjax.config.knn`."""

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """See `Labelled.open`.

        Raises:
          UserError: also where there are fewer than `k` training images.
        """
        super().open(beat)
        if self._entry.k > len(self._train):
            raise UserError(f'k: split "{self._entry.train_split}" has {len(self._train)} images, not {self._entry.k}')

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields `knn_top1`. With a picture's path it writes each class's recall beside it (.csv)."""
        train, test = yield from self._features(model)
        similarities, neighbours = nearest(
            _unit(test.features), _unit(train.features), self._entry.k, model.mesh, self._beat
        )
        votes = weigh(similarities, train.labels[neighbours], self._class_count, self._entry.temperature)
        right = correct(votes, test.labels)
        yield "knn_top1", float(right.mean())
        if picture is not None:
            recalls.write(picture.with_suffix(".csv"), self._class_names, test.labels, right)


def nearest(
    queries: Float[np.ndarray, "queries width"],
    gallery: Float[np.ndarray, "images width"],
    k: int,
    mesh: Mesh,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """The k largest products of each query and their images, best first; of equal ones, the first images.

    They are computed in chunks, the queries of each split over the devices of `mesh`; the whole matrix is never held.
    `beat` is called for each chunk.
    """
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    neighbours = np.zeros((len(queries), k), np.int64)
    for first in range(0, len(gallery), GALLERY):
        images = place(mesh, gallery[first : first + GALLERY], split=False)
        for start in range(0, len(queries), QUERIES):
            rows = slice(start, start + QUERIES)
            best = _best(place(mesh, queries[rows]), images, min(k, len(images)), mesh)
            values, found = (x[: len(queries[rows])] for x in jax.device_get(best))
            values = np.concatenate([similarities[rows], values], axis=1)
            found = np.concatenate([neighbours[rows], found + first], axis=1)
            order = np.argsort(-values, axis=1, kind="stable")[:, :k]
            similarities[rows] = np.take_along_axis(values, order, axis=1)
            neighbours[rows] = np.take_along_axis(found, order, axis=1)
            beat()
    return similarities, neighbours


@partial(jax.jit, static_argnames=("k", "mesh"))
def _best(
    queries: Float[Array, "queries width"], images: Float[Array, "images width"], k: int, mesh: Mesh
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    best = jax.lax.top_k(jnp.matmul(queries, images.T, precision="highest"), k)
    return jax.lax.with_sharding_constraint(best, NamedSharding(mesh, P()))


def weigh(
    similarities: Float[np.ndarray, "queries k"], labels: Int[np.ndarray, "queries k"], classes: int, temperature: float
) -> Float[np.ndarray, "queries classes"]:
    """Each class's share of the votes of a query's neighbours, whose weights are exp(similarity / temperature).

    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", Wu et al. 2018, section 3.4.
    """
    with np.errstate(invalid="ignore"):  # of NaNs, which earn nothing
        weights = np.exp((similarities - similarities.max(axis=1, keepdims=True)) / temperature)
    votes = np.zeros((len(labels), classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes / votes.sum(axis=1, keepdims=True)


def _unit(features: Float[np.ndarray, "images width"]) -> Float[np.ndarray, "images width"]:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
