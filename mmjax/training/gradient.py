"""The gradient of a step: of the batch at once, or the same in microbatches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from mmjax.objectives import ACROSS_ROWS, OBJECTIVES
from mmjax.sharding.rules import constrain

Batch = Mapping[str, Array]
Outputs = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
Gradient = Callable[[PyTree, Batch, Array, tuple[str, ...]], tuple[PyTree, Metrics]]


def make_gradient(config: ConfigDict, model: nn.Module) -> Gradient:
    """Makes `gradient(params, batch, rng, objective names) -> (gradient, metrics)` of the weighted sum of objectives.

    `train.microbatches` changes the memory that it takes, and not the result.
    """
    entries, count = dict(config.objectives.items()), config.train.microbatches

    def apply(params: PyTree, batch: Batch) -> Outputs:
        return model.apply({"params": params}, batch)

    return partial(_at_once, apply, entries) if count == 1 else partial(_in_microbatches, apply, entries, count)


def _at_once(
    apply: Callable, entries: Mapping[str, ConfigDict], params: PyTree, batch: Batch, rng: Array, names: tuple[str, ...]
) -> tuple[PyTree, Metrics]:
    def total(params: PyTree) -> tuple[Array, Metrics]:
        return _sum({name: entries[name] for name in names}, apply(params, batch), batch, rng)

    (loss, metrics), grads = jax.value_and_grad(total, has_aux=True)(params)
    return grads, {"train/loss": loss} | metrics


def _in_microbatches(
    apply: Callable,
    entries: Mapping[str, ConfigDict],
    count: int,
    params: PyTree,
    batch: Batch,
    rng: Array,
    names: tuple[str, ...],
) -> tuple[PyTree, Metrics]:
    """The whole batch's gradient with the activations of one microbatch.

    A first pass only encodes. The objectives across rows then see all embeddings at once, and a second pass sends
    their gradients through the towers, a microbatch at a time ("Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup", Gao et al. 2021, section 3; also "Combined Scaling for Zero-shot Transfer Learning", Pham et
    al. 2021). The other objectives run in the second pass, where each microbatch counts for its share.
    """
    across = {name: entries[name] for name in names if entries[name].kind in ACROSS_ROWS}
    by_row = {name: entries[name] for name in names if name not in across}
    numbers, split = jnp.arange(count), jax.tree.map(partial(_split, count), dict(batch))

    def encode(_, inputs: tuple[Batch, Array]) -> tuple[None, tuple[PyTree, PyTree]]:
        microbatch, number = inputs
        outputs = apply(params, microbatch)
        results = _results(by_row, outputs, microbatch, jax.random.fold_in(rng, number))
        counts = {name: metrics.get("count", jnp.ones(())) for name, (_, metrics) in results.items()}
        return None, (_embeddings(outputs) if across else {}, counts)

    _, (embeddings, counts) = jax.lax.scan(encode, None, (split, numbers))
    shares = {name: each / jnp.maximum(each.sum(), 1e-9) for name, each in counts.items()}

    def compare(embeddings: PyTree) -> tuple[Array, Metrics]:
        return _sum(across, jax.tree.map(_join, embeddings), batch, rng)

    (loss, metrics), slopes = jax.value_and_grad(compare, has_aux=True)(embeddings)

    def add(grads: PyTree, inputs: tuple[Batch, Array, PyTree, Metrics]) -> tuple[PyTree, tuple[Array, Metrics]]:
        microbatch, number, slopes, shares = inputs

        def part(params: PyTree) -> tuple[Array, tuple[Array, Metrics]]:
            outputs = apply(params, microbatch)
            loss, metrics = _sum(by_row, outputs, microbatch, jax.random.fold_in(rng, number), shares)
            # Its gradient is that of the objectives across rows, through this microbatch's embeddings.
            products = jax.tree.map(jnp.vdot, _embeddings(outputs) if across else {}, slopes)
            return loss + sum(jax.tree.leaves(products)), (loss, metrics)

        own, values = jax.grad(part, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, own), values

    grads, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (split, numbers, slopes, shares))
    row_loss, row_metrics = jax.tree.map(lambda x: x.sum(axis=0), values)
    return grads, {"train/loss": loss + row_loss} | metrics | row_metrics


def _results(entries: Mapping[str, ConfigDict], outputs: Outputs, batch: Batch, rng: Array) -> dict[str, tuple]:
    """What each objective returns: its loss and its metrics."""
    results = {}
    for number, (name, entry) in enumerate(sorted(entries.items())):
        options = {key: value for key, value in entry.items() if key not in ("kind", "weight")}
        results[name] = OBJECTIVES[entry.kind](outputs, batch, jax.random.fold_in(rng, number), **options)
    return results


def _sum(
    entries: Mapping[str, ConfigDict], outputs: Outputs, batch: Batch, rng: Array, shares: Metrics | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted sum of the objectives and their metrics; of `shares` of them where given."""
    total, named = jnp.zeros(()), {}
    for name, (loss, metrics) in _results(entries, outputs, batch, rng).items():
        share = 1.0 if shares is None else shares[name]
        total += share * entries[name].weight * loss
        values = {key: value for key, value in metrics.items() if key != "count"} | {"loss": loss}
        named |= {f"train/{name}_{key}": share * value for key, value in values.items()}
    return total, named


def _embeddings(outputs: Outputs) -> dict[str, Any]:
    """What objectives across rows read."""
    modalities = {name: out for name, out in outputs.items() if isinstance(out, Mapping) and "embedding" in out}
    embeddings = {name: {"embedding": out["embedding"]} for name, out in modalities.items()}
    return embeddings | {name: outputs[name] for name in ("logit_scale", "logit_bias")}


def _split(count: int, x: Array) -> Array:
    """[batch, ...] to [microbatch, row, ...]: each has every count-th row, so that rows stay on their devices."""
    split = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    return constrain(split, None, "batch", *[None] * (x.ndim - 1))


def _join(x: Array) -> Array:
    """The inverse of `_split`; of the learned logit parameters, which every microbatch returns, the first."""
    return x[0] if x.ndim == 1 else x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
