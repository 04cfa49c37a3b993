"""The gradient of a step: of the batch at once, or the same in microbatches."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from mmjax.models.multimodal import MultimodalModel
from mmjax.models.outputs import Outputs, Vocabulary
from mmjax.objectives import OBJECTIVES, parts_read, reads_teacher
from mmjax.sharding.rules import constrain, path_name

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]
# The teacher's outputs for a batch, without a gradient.
Teacher = Callable[[Batch], Outputs]
Gradient = Callable[[PyTree, Batch, Array, tuple[str, ...], Teacher | None], tuple[PyTree, Metrics]]


def make_gradient(config: ConfigDict, module: MultimodalModel, vocabulary: Vocabulary | None = None) -> Gradient:
    """Makes `gradient(params, batch, rng, objective names, teacher) -> (gradient, metrics)` of the weighted sum of
    objectives.

    `train.microbatches` changes the memory that it takes, and not the result. Parameters that `optimizer.rules` freeze
    have a gradient of 0, and nothing is saved for it.
    """
    count, freeze = config.train.microbatches, partial(_stop_frozen, config.optimizer.rules)

    def gradient(
        params: PyTree, batch: Batch, rng: Array, names: tuple[str, ...], teacher: Teacher | None = None
    ) -> tuple[PyTree, Metrics]:
        entries = {name: config.objectives[name] for name in names}
        part = _Part(module, vocabulary, entries, sorted(config.objectives), freeze, teacher)
        if count == 1:
            grads, (loss, metrics, squares) = part.gradient(params, batch, rng, entries, {}, {})
        else:
            grads, (loss, metrics, squares) = _in_microbatches(part, count, params, batch, rng)
        norms = {f"train/{key}_grad_norm": jnp.sqrt(value) for key, value in squares.items()}
        return grads, {"train/loss": loss} | metrics | (norms if len(names) > 1 else {})

    return gradient


def _stop_frozen(rules: tuple, params: PyTree) -> PyTree:
    """Cuts off the gradient of those parameters whose first matching rule has a learning rate of None."""
    if all(rate is not None for _, rate, _ in rules):
        return params

    def stop(path: tuple, leaf: Array) -> Array:
        rule = next((rule for rule in rules if re.search(rule[0], path_name(path))), None)
        return jax.lax.stop_gradient(leaf) if rule and rule[1] is None else leaf

    return jax.tree_util.tree_map_with_path(stop, params)


class _Part:
    """The gradient of one part of a batch (or all of it), each tower run once, however many objectives read it."""

    def __init__(
        self,
        module: MultimodalModel,
        vocabulary: Vocabulary | None,
        entries: Mapping[str, ConfigDict],
        names: Sequence[str],
        freeze: Callable[[PyTree], PyTree],
        teacher: Teacher | None,
    ):
        self.entries, self._module, self._vocabulary, self._freeze = entries, module, vocabulary, freeze
        self._names, self._teacher = names, teacher
        self.needs_teacher = reads_teacher(entries)
        parts = {part for entry in entries.values() for part in parts_read(entry, module.config)}
        self._modalities = [name for name in module.config["encoders"] if name in module.parts and name in parts]

    def gradient(
        self,
        params: PyTree,
        batch: Batch,
        rng: Array,
        by_row: Mapping[str, ConfigDict],
        slopes: Mapping[str, PyTree],
        shares: Metrics,
    ) -> tuple[PyTree, tuple[Array, Metrics, Metrics]]:
        """Of `shares` of the objectives `by_row`, and of those whose gradient with respect to the embeddings is known.

        Returns:
          The gradient, and what has no gradient: the loss and the metrics of `by_row`, and the square of the norm of
          each objective's gradient with respect to each tower's tokens.
        """
        modalities = [name for name in self._modalities if name in batch]

        def towers(params: PyTree) -> tuple[PyTree, PyTree]:
            out = {name: self._tokens(params, name, batch) for name in modalities}
            return {name: tokens for name, (tokens, _) in out.items()}, {
                name: valid for name, (_, valid) in out.items()
            }

        tokens, pull, valid = jax.vjp(lambda params: towers(self._freeze(params)), params, has_aux=True)
        teacher = self._teacher(batch) if self.needs_teacher else None

        def outputs_of(params: PyTree, tokens: PyTree) -> Outputs:
            params = self._freeze(params)
            known = {name: self._embed(params, name, tokens[name], valid[name]) for name in modalities}
            known |= {"teacher": teacher} if teacher is not None else {}
            return Outputs(self._module, params, batch, known, self._vocabulary)

        def value(name: str, params: PyTree, tokens: PyTree) -> tuple[Array, tuple[Array, Metrics]]:
            if name in slopes:
                # Its gradient is that of an objective across rows, through these rows' embeddings.
                products = jax.tree.map(jnp.vdot, embeddings(outputs_of(params, tokens)), slopes[name])
                return sum(jax.tree.leaves(products)), (jnp.zeros(()), {})
            results = self.results({name: by_row[name]}, outputs_of(params, tokens), batch, rng)
            loss, metrics = _sum(by_row, results, shares)
            return loss, (loss, metrics)

        grads, token_grads, loss, metrics, squares = None, None, jnp.zeros(()), {}, {}
        for name in (*by_row, *slopes):
            (own, own_tokens), (part, found) = jax.grad(partial(value, name), argnums=(0, 1), has_aux=True)(
                params, tokens
            )
            loss, metrics = loss + part, metrics | found
            squares |= {
                f"{name}_{modality}": (slope.astype(jnp.float32) ** 2).sum() for modality, slope in own_tokens.items()
            }
            grads = own if grads is None else jax.tree.map(jnp.add, grads, own)
            token_grads = own_tokens if token_grads is None else jax.tree.map(jnp.add, token_grads, own_tokens)
        return jax.tree.map(jnp.add, grads, pull(token_grads)[0]), (loss, metrics, squares)

    def outputs(self, params: PyTree, batch: Batch) -> Outputs:
        """All that objectives can read of a part of the batch."""
        teacher = {"teacher": self._teacher(batch)} if self.needs_teacher else {}
        return Outputs(self._module, params, batch, teacher, self._vocabulary)

    def results(self, entries: Mapping[str, ConfigDict], outputs: Mapping[str, Any], batch: Batch, rng: Array) -> dict:
        """What each objective returns: its loss and its metrics."""
        results = {}
        for name, entry in entries.items():
            options = {key: value for key, value in entry.items() if key not in ("kind", "weight")}
            # Among those of all streams: what is drawn does not depend on the others of this one. Towers' are small.
            number = 1000 + self._names.index(name)
            keys = jax.vmap(jax.random.fold_in, (0, None))(batch["rng"], number)
            results[name] = OBJECTIVES[entry.kind].run(
                outputs, {**batch, "rng": keys}, jax.random.fold_in(rng, number), **options
            )
        return results

    def _tokens(self, params: PyTree, modality: str, batch: Batch) -> tuple[Array, Array | None]:
        inputs = batch[modality], batch["rng"]
        return self._module.apply({"params": params}, modality, *inputs, method="tokens")

    def _embed(self, params: PyTree, modality: str, tokens: Array, valid: Array | None) -> dict[str, Array]:
        embedded = self._module.apply({"params": params}, modality, tokens, valid, method="embed")
        return {"tokens": tokens, "valid": valid, **embedded}


def _in_microbatches(
    part: _Part, count: int, params: PyTree, batch: Batch, rng: Array
) -> tuple[PyTree, tuple[Array, Metrics, Metrics]]:
    """The whole batch's gradient with the activations of one microbatch.

    A first pass only encodes. The objectives across rows then see all embeddings at once, and a second pass sends
    their gradients through the towers, a microbatch at a time ("Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup", Gao et al. 2021, section 3; also "Combined Scaling for Zero-shot Transfer Learning", Pham et
    al. 2021). The other objectives run in the second pass, where each microbatch counts for its share.
    """
    across = {name: entry for name, entry in part.entries.items() if OBJECTIVES[entry.kind].across_rows}
    by_row = {name: entry for name, entry in part.entries.items() if name not in across}
    numbers, split = jnp.arange(count), jax.tree.map(partial(_split, count), dict(batch))

    def encode(_, inputs: tuple[Batch, Array]) -> tuple[None, tuple[PyTree, Metrics]]:
        microbatch, number = inputs
        outputs = part.outputs(params, microbatch)
        results = part.results(by_row, outputs, microbatch, jax.random.fold_in(rng, number))
        counts = {name: metrics.get("count", jnp.ones(())) for name, (_, metrics) in results.items()}
        return None, (embeddings(outputs) if across else {}, counts)

    _, (encoded, counts) = jax.lax.scan(encode, None, (split, numbers))
    shares = {name: each / jnp.maximum(each.sum(), 1e-9) for name, each in counts.items()}
    encoded = jax.tree.map(_join, encoded)

    loss, metrics, slopes = jnp.zeros(()), {}, {}
    for name in across:

        def compare(embedded: PyTree, name: str = name) -> tuple[Array, Metrics]:
            return _sum(across, part.results({name: across[name]}, embedded, batch, rng), {})

        (own, found), slopes[name] = jax.value_and_grad(compare, has_aux=True)(encoded)
        loss, metrics = loss + own, metrics | found

    # The logit parameters come once with every microbatch, where each counts in full.
    def divide(slope: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count,)) if x.ndim == 0 else _split(count, x), slope)

    def add(grads: PyTree, inputs: tuple) -> tuple[PyTree, tuple[Array, Metrics, Metrics]]:
        microbatch, number, slopes, shares = inputs
        own, values = part.gradient(params, microbatch, jax.random.fold_in(rng, number), by_row, slopes, shares)
        return jax.tree.map(jnp.add, grads, own), values

    slopes = jax.tree.map(lambda slope: slope / count if slope.ndim == 0 else slope, slopes)
    inputs = split, numbers, {name: divide(slope) for name, slope in slopes.items()}, shares
    grads, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), inputs)
    row_loss, row_metrics, squares = jax.tree.map(lambda x: x.sum(axis=0), values)
    return grads, (loss + row_loss, metrics | row_metrics, squares)


def _sum(
    entries: Mapping[str, ConfigDict], results: Mapping[str, tuple], shares: Metrics
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted sum of the objectives and their metrics; of `shares` of them where given."""
    total, named = jnp.zeros(()), {}
    for name, (loss, metrics) in results.items():
        share = shares.get(name, 1.0)
        total += share * entries[name].weight * loss
        values = {key: value for key, value in metrics.items() if key != "count"} | {"loss": loss}
        named |= {f"train/{name}_{key}": share * value for key, value in values.items()}
    return total, named


def embeddings(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """What objectives across rows read."""
    found: dict[str, Any] = {"logit_scale": outputs["logit_scale"], "logit_bias": outputs["logit_bias"]}
    for name in ("image", "text"):
        if name in outputs:
            found[name] = {"embedding": outputs[name]["embedding"]}
    return found | ({"teacher": embeddings(outputs["teacher"])} if "teacher" in outputs else {})


def _split(count: int, x: Array) -> Array:
    """[batch, ...] to [microbatch, row, ...]: each has every count-th row, so that rows stay on their devices."""
    split = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    return constrain(split, None, "batch", *[None] * (x.ndim - 1))


def _join(x: Array) -> Array:
    """The inverse of `_split`; of the learned logit parameters, which every microbatch returns, the first."""
    return x[0] if x.ndim == 1 else x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
