"""Places in an order of similarity. Similarities are computed in chunks: all of them are never held at once.

They are exact, which makes ties ties. A float32 product rounds, and how depends on where in the matrix a row or column
stands: copies of one vector then score a little differently, and of a hundred copies one comes out first.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

CHUNK = 1024
TOP = 10
_BITS = 26  # sums of products of whole numbers with norms up to 2^26 stay below 2^53, and so exact in float64


def ranks(
    queries: Float[np.ndarray, "queries dim"],
    gallery: Float[np.ndarray, "items dim"],
    query_owners: Int[np.ndarray, " queries"],
    item_owners: Int[np.ndarray, " items"],
) -> Int[np.ndarray, " queries"]:
    """The rank (0 is first) of the best item with the query's owner; every query's owner needs an item.

    It is the number of other owners' items that score at least as high: a tie counts against the model, so equal
    embeddings earn nothing, and neither do NaNs.
    """
    return rivals(queries, gallery, query_owners, item_owners, count=1)[0][:, 0]


def rivals(
    queries: Float[np.ndarray, "queries dim"],
    gallery: Float[np.ndarray, "items dim"],
    query_owners: Int[np.ndarray, " queries"],
    item_owners: Int[np.ndarray, " items"],
    count: int = TOP,
    both: bool = False,
) -> tuple[Int[np.ndarray, "queries own"], Int[np.ndarray, "items own"]]:
    """How many items of other owners score at least as high as each of a query's own items.

    Column i is about the query's i-th best own item, for the `count` best or as many as a query has at most; -1 where
    it has fewer. With `both`, the second array says the same of the gallery's search among the queries, from the same
    products; otherwise it has no columns. A score that is NaN is the highest of other owners', the lowest of own items.

    Embeddings are rounded to multiples of 2^-26 times the power of two above the longest one's norm, which moves a
    cosine by about 1e-8, less than float32 products do; everything after that is exact. So the result depends neither
    on chunks nor on threads. Memory: the embeddings once more, CHUNK x CHUNK similarities, and all pairs of a query
    and an own item.
    """
    queries, gallery = _whole(queries), _whole(gallery)
    rows, columns = _own_pairs(query_owners, item_owners)
    scores = np.concatenate([np.zeros(0), *_pair_scores(queries, gallery, rows, columns)])
    query_bars = _bars(rows, scores, len(queries), count)
    item_bars = _bars(columns, scores, len(gallery), count if both else 0)
    found = _not_below(queries, gallery, query_bars, item_bars)
    for reached, bars, owner in zip(found, (query_bars, item_bars), (rows, columns), strict=True):
        np.subtract.at(reached, owner, ~(scores[:, None] < bars[owner]))
        reached[np.isnan(bars)] = -1
    return found


def average_precision(rivals: Int[np.ndarray, "queries own"]) -> Float[np.ndarray, " queries"]:
    """The average precision over the first TOP items of each query, from `rivals` of at least TOP own items.

    It is the sum, over the query's own items among the first TOP, of the precision at their places, divided by the
    number of own items or by TOP, whichever is less: 1 where own items fill as many of the first places as they can
    (Manning, Raghavan and Schütze, "Introduction to Information Retrieval", section 8.4, cut off at TOP). A tie counts
    against the model.
    """
    own = np.arange(1, rivals.shape[1] + 1)
    places, there = rivals + own, rivals >= 0
    precisions = np.where(there & (places <= TOP), own / np.where(there, places, 1), 0.0)
    return precisions.sum(axis=1) / there.sum(axis=1)


def best(
    queries: Float[np.ndarray, "queries dim"], gallery: Float[np.ndarray, "items dim"], count: int
) -> Int[np.ndarray, "queries count"]:
    """The `count` most similar items of each query, best first."""
    parts = []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ gallery.T
        parts.append(np.argsort(-scores, axis=1, kind="stable")[:, :count])
    return np.concatenate(parts)


def reranked(
    found: Int[np.ndarray, " queries"],
    scores: Float[np.ndarray, "queries count"],
    right: Bool[np.ndarray, "queries count"],
) -> Int[np.ndarray, " queries"]:
    """The rank of each query's first right item after its first `count` items are ordered by `scores`.

    What is not among them keeps its rank, `found`; and so does what is there only because, of items that score alike,
    some had to come first. A tie counts against the model, as in `ranks`.
    """
    own = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    among = right.any(axis=1) & (found < scores.shape[1])
    return np.where(among, (~(scores < own) & ~right).sum(axis=1), found)


def _whole(embeddings: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
    """The embeddings in whole numbers, of norm 2^26 at most; NaN where one is not finite."""
    whole = embeddings.astype(np.float32)
    norms = np.sqrt(np.einsum("rd,rd->r", whole, whole))
    finite = np.isfinite(norms)
    _, exponent = np.frexp(norms.max(where=finite, initial=0.0))  # the longest norm is below 2^exponent
    np.ldexp(whole, _BITS - exponent, out=whole)
    np.rint(whole, out=whole)
    whole[~finite] = np.nan
    return whole


def _own_pairs(
    query_owners: Int[np.ndarray, " queries"], item_owners: Int[np.ndarray, " items"]
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """All pairs of a query and an item with the same owner."""
    order = np.argsort(item_owners, kind="stable")
    first, last = (np.searchsorted(item_owners[order], query_owners, side) for side in ("left", "right"))
    own = last - first
    rows = np.repeat(np.arange(len(query_owners)), own)
    numbers = np.arange(len(rows)) - np.repeat(np.cumsum(own) - own, own)  # 0, 1, ... in each query
    return rows, order[first[rows] + numbers]


def _pair_scores(
    queries: np.ndarray, gallery: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> Iterator[Float[np.ndarray, " part"]]:
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        pair = (side[numbers[part]].astype(np.float64) for side, numbers in ((queries, rows), (gallery, columns)))
        yield np.einsum("pd,pd->p", *pair)


def _bars(
    owners: Int[np.ndarray, " pairs"], scores: Float[np.ndarray, " pairs"], size: int, count: int
) -> Float[np.ndarray, "size own"]:
    """The `count` highest scores of each owner, or as many as one has at most; NaN where it has fewer."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order, each = np.lexsort((-scores, owners)), np.bincount(owners, minlength=size)
    bars = np.full((size, min(count, each.max(initial=0))), np.nan)
    place = np.arange(len(order)) - np.repeat(np.cumsum(each) - each, each)
    kept = place < bars.shape[1]
    bars[owners[order[kept]], place[kept]] = scores[order[kept]]
    return bars


def _not_below(
    queries: Float[np.ndarray, "queries dim"],
    gallery: Float[np.ndarray, "items dim"],
    query_bars: Float[np.ndarray, "queries own"],
    item_bars: Float[np.ndarray, "items own"],
) -> tuple[Int[np.ndarray, "queries own"], Int[np.ndarray, "items own"]]:
    """How many items' scores are not less than each of a query's bars, and the other way round."""
    by_query, by_item = np.zeros(query_bars.shape, np.int64), np.zeros(item_bars.shape, np.int64)
    for first in range(0, len(queries), CHUNK):
        rows = slice(first, first + CHUNK)
        block = queries[rows].astype(np.float64)
        for second in range(0, len(gallery), CHUNK):
            columns = slice(second, second + CHUNK)
            scores = block @ gallery[columns].T.astype(np.float64)
            for own, bar in enumerate(query_bars[rows].T):
                by_query[rows, own] += scores.shape[1] - _count(scores < bar[:, None], axis=1)
            for own, bar in enumerate(item_bars[columns].T):
                by_item[columns, own] += scores.shape[0] - _count(scores < bar, axis=0)
    return by_query, by_item


def _count(flags: Bool[np.ndarray, "rows columns"], axis: int) -> Int[np.ndarray, " others"]:
    """How many are set, several times as fast as summing them as 64-bit numbers."""
    return flags.view(np.uint8).sum(axis=axis, dtype=np.uint16).astype(np.int64)
