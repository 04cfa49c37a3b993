"""The optimizer of a config: schedule, update rule, and what the parameters' paths change."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mmjax.errors import UserError
from mmjax.sharding.rules import path_name

# Weight decay is for matrices. Stacked biases have two dimensions too, hence by name.
DECAYED = re.compile(r"(^|/)kernel$")


def in_steps(value: float, unit: str, batch_size: int, record_count: int) -> int:
    """Converts a duration in "steps", "examples" or "epochs" to steps, rounded to the nearest."""
    examples = {"steps": batch_size, "examples": 1, "epochs": record_count}[unit]
    return round(value * examples / batch_size)


def learning_rate_schedule(optimizer: ConfigDict, total_steps: int, warmup_steps: int) -> Callable[[Array], Array]:
    """Step -> learning rate: a linear warm-up, then the named decay.

    "cosine" and "linear" reach 0 at the last step; "rsqrt" falls with the square root of the step
    ("Scaling Vision Transformers", Zhai et al. 2022, section 3.5) from the end of the warm-up.

    Raises:
      UserError: the warm-up is as long as the run.
    """
    peak = optimizer.learning_rate
    if warmup_steps >= total_steps:
        raise UserError(f"config.optimizer.warmup: {warmup_steps} steps leave none of the run's {total_steps}")
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, total_steps - warmup_steps),
        "linear": optax.linear_schedule(peak, 0.0, total_steps - warmup_steps),
        "rsqrt": lambda step: peak / jnp.sqrt(1 + jnp.maximum(step, 0) / max(warmup_steps, 1)),
        "constant": optax.constant_schedule(peak),
    }
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, decays[optimizer.schedule]], [warmup_steps])


def make_optimizer(optimizer: ConfigDict, params: PyTree) -> optax.GradientTransformation:
    """The gradient transformation of `config.optimizer` for these parameters (or their shapes), but for the learning
    rate: what it returns is to be multiplied by that of the step and subtracted.

    Skipped steps change no state of the optimizer, so its own count of updates would fall behind the schedule.

    The first of `optimizer.rules` whose pattern is found in a parameter's path gives its multipliers;
    a learning-rate multiplier of None freezes it: no update and no optimizer state.

    Raises:
      UserError: a rule matches no parameter, or all parameters are frozen.
    """
    multipliers = _multipliers(optimizer.rules, params)
    if all(rate is None for rate, _ in multipliers.values()):
        raise UserError("config.optimizer.rules freeze every parameter")

    def decay_and_scale(updates, state, params):
        def change(path, update, param):
            rate, decay = multipliers[path_name(path)]
            return (update + optimizer.weight_decay * decay * param.astype(update.dtype) if decay else update) * rate

        return jax.tree_util.tree_map_with_path(change, updates, params), state

    trained = optax.chain(
        optax.clip_by_global_norm(optimizer.grad_clip_norm) if optimizer.grad_clip_norm else optax.identity(),
        _update_rule(optimizer),
        optax.GradientTransformation(lambda params: optax.EmptyState(), decay_and_scale),
    )
    if all(rate is not None for rate, _ in multipliers.values()):
        return trained

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if multipliers[path_name(path)][0] is None else "trained", params
        )

    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def _multipliers(rules: tuple, params: PyTree) -> dict[str, tuple[float | None, float]]:
    """Path -> (learning-rate multiplier or None, weight-decay multiplier)."""
    multipliers, used = {}, set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        decay = 1.0 if DECAYED.search(name) else 0.0
        rule = next((rule for rule in rules if re.search(rule[0], name)), (None, 1.0, 1.0))
        used.add(rule[0])
        multipliers[name] = (rule[1], decay * rule[2])
    for pattern, *_ in rules:
        if pattern not in used:
            raise UserError(f"config.optimizer.rules: {pattern!r} matches no parameter that an earlier rule left")
    return multipliers


def _update_rule(optimizer: ConfigDict) -> optax.GradientTransformation:
    b1, b2, epsilon, dtype = optimizer.b1, optimizer.b2, optimizer.epsilon, optimizer.first_moment_dtype
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon, mu_dtype=dtype)
    if optimizer.name == "adamw":
        return adam
    if optimizer.name == "lion":
        return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=dtype)
    if optimizer.name == "adafactor":  # with momentum, as in Zhai et al. 2022, section 3.4
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8),
            optax.clip_by_block_rms(1.0),
            optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(dtype)) if b1 else optax.identity(),
        )

    # Muon orthogonalises the momentum of the matrices (of each layer's, where they are stacked);
    # everything else takes Adam.
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if DECAYED.search(path_name(path)) else "adam", params
        )

    def matrix_axes(params):
        return jax.tree.map(lambda leaf: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), params)

    muon = scale_by_muon(beta=b1, mu_dtype=dtype, weight_dimension_numbers=matrix_axes)
    return optax.partition({"muon": muon, "adam": adam}, labels)
