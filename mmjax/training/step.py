"""The training step: the one function that is compiled in training."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mmjax.models.multimodal import MultimodalModel
from mmjax.models.outputs import Vocabulary
from mmjax.training import health
from mmjax.training.gradient import Metrics, make_gradient
from mmjax.training.state import TrainState
from mmjax.training.teacher import Teacher


def make_train_step(
    config: ConfigDict,
    model: MultimodalModel,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    vocabulary: Vocabulary | None = None,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes `train_step(state, batch, objective names, teacher's params) -> (state, metrics)`, to be jit-compiled.

    Random numbers of step s depend on (config.seed, s) alone; those of a row also on its place in the global batch:
    the model and the objectives find its key in `batch["rng"]`.
    """
    gradient = make_gradient(config, model, vocabulary)
    ema_decay, seed = config.train.ema_decay, config.seed

    def train_step(
        state: TrainState, batch: Mapping[str, Array], names: tuple[str, ...], teacher_params: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        rng, row_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        batch = {**batch, "rng": jax.random.split(row_rng, len(next(iter(batch.values()))))}
        teach = teacher.of(teacher_params or state.ema) if teacher else None
        grads, metrics = gradient(state.params, batch, rng, names, teach)
        with jax.named_scope("optimizer"):  # for who reads a profile
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            rate = schedule(state.step)
            params = jax.tree.map(lambda old, update: old - rate * update, state.params, updates)
        grad_norm = optax.tree.norm(grads)
        metrics |= {"train/grad_norm": grad_norm, "train/learning_rate": rate}
        ema = state.ema
        if ema_decay:
            # A young average follows faster, or it would remember its random start.
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            with jax.named_scope("optimizer"):
                ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
        good, judged = health.judge(state.health, metrics["train/loss"], grad_norm, config.health.spike_zscore)
        old, new = (state.params, state.opt_state, state.ema), (params, opt_state, ema)
        params, opt_state, ema = jax.tree.map(lambda was, becomes: jnp.where(good, becomes, was), old, new)
        return TrainState(state.step + 1, params, opt_state, ema, judged), metrics | health.metrics(judged)

    return train_step
