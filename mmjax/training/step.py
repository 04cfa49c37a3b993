"""The training step: the one function that is compiled in training."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from mmjax.objectives import OBJECTIVES
from mmjax.training import health
from mmjax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]


def make_train_step(
    config: ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
) -> Callable[[TrainState, Mapping[str, Array], tuple[str, ...]], tuple[TrainState, Metrics]]:
    """Makes `train_step(state, batch, objective names) -> (state, metrics)`, to be jit-compiled.

    Random numbers of step s depend on (config.seed, s) alone.
    """
    entries = {name: (OBJECTIVES[entry.kind], entry.weight) for name, entry in config.objectives.items()}
    microbatches, ema_decay, seed = config.train.microbatches, config.train.ema_decay, config.seed

    def loss_of(params: PyTree, batch: Mapping[str, Array], rng: Array, names: tuple[str, ...]):
        outputs = model.apply({"params": params}, batch)
        total, metrics = jnp.zeros(()), {}
        for number, name in enumerate(names):
            objective, weight = entries[name]
            loss, own = objective(outputs, batch, jax.random.fold_in(rng, number))
            total += weight * loss
            metrics |= {f"train/{name}_loss": loss} | {f"train/{name}_{key}": value for key, value in own.items()}
        return total, {"train/loss": total} | metrics

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def train_step(state: TrainState, batch: Mapping[str, Array], names: tuple[str, ...]) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if microbatches == 1:
            (_, metrics), grads = gradient(state.params, batch, rng, names)
        else:
            grads, metrics = _accumulate(gradient, state.params, batch, rng, names, microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        metrics |= {"train/grad_norm": grad_norm, "train/learning_rate": schedule(state.step)}
        ema = state.ema
        if ema_decay:
            # A young average follows faster, or it would remember its random start.
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
        good, judged = health.judge(state.health, metrics["train/loss"], grad_norm, config.health.spike_zscore)
        old, new = (state.params, state.opt_state, state.ema), (params, opt_state, ema)
        params, opt_state, ema = jax.tree.map(lambda was, becomes: jnp.where(good, becomes, was), old, new)
        return TrainState(state.step + 1, params, opt_state, ema, judged), metrics | health.metrics(judged)

    return train_step


def _accumulate(
    gradient: Callable, params: PyTree, batch: Mapping[str, Array], rng: Array, names: tuple[str, ...], count: int
) -> tuple[PyTree, Metrics]:
    """Averages gradients and metrics over `count` microbatches, each with every count-th row.

    A contrastive loss then has the negatives of its microbatch, not those of the whole batch.
    """
    # Every count-th row, so that each device's rows stay where they are.
    split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))

    def add(total: PyTree, inputs: tuple[dict[str, Any], Array]) -> tuple[PyTree, None]:
        microbatch, number = inputs
        (_, metrics), grads = gradient(params, microbatch, jax.random.fold_in(rng, number), names)
        return jax.tree.map(lambda a, b: a + b / count, total, (grads, metrics)), None

    first = jax.tree.map(lambda x: x[0], split)
    (_, metrics), grads = jax.eval_shape(lambda: gradient(params, first, rng, names))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
    (grads, metrics), _ = jax.lax.scan(add, zeros, (split, jnp.arange(count)))
    return grads, metrics
