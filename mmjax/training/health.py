"""Steps that must not count: a loss or a gradient that is not finite, or far out of the usual."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

MEMORY = 0.99  # of the running mean and variance: about the last hundred accepted steps
FIRST_JUDGED = 100  # accepted steps before which nothing is taken for a spike


@struct.dataclass
class Health:
    """What the guard remembers from step to step; part of the training state, and of its checkpoints.

    `mean` and `variance` are of the loss and the gradient's norm over the accepted steps. `rollbacks` counts how often
    the run went back to a checkpoint.
    """

    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    accepted: Int[Array, ""]
    rollbacks: Int[Array, ""]
    mean: Float[Array, "2"]
    variance: Float[Array, "2"]


def new() -> Health:
    """Of a run that has made no step."""

    def zero() -> Array:  # each its own: the state's buffers are donated
        return jnp.zeros((), jnp.int32)

    return Health(zero(), zero(), zero(), zero(), jnp.zeros(2), jnp.zeros(2))


def judge(
    health: Health, loss: Float[Array, ""], grad_norm: Float[Array, ""], spike_zscore: float
) -> tuple[Bool[Array, ""], Health]:
    """Whether a step may change the state, and what is remembered of it.

    It may where loss and gradient norm are finite and, if `spike_zscore` is not 0, neither lies more than so many
    standard deviations above its mean. Whatever is skipped leaves mean and variance as they are.
    """
    values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    good = jnp.isfinite(values).all()
    if spike_zscore:
        above = values - health.mean > spike_zscore * jnp.sqrt(health.variance)
        good &= ~(above.any() & (health.accepted >= FIRST_JUDGED))
    accepted = health.accepted + good
    # At first a plain mean of what there is, which an average that starts at 0 would not be.
    share = jnp.maximum(1 - MEMORY, 1 / jnp.maximum(accepted, 1))
    difference = jnp.where(good, values - health.mean, 0.0)
    judged = Health(
        skipped=health.skipped + ~good,
        skipped_in_a_row=jnp.where(good, 0, health.skipped_in_a_row + 1),
        accepted=accepted,
        rollbacks=health.rollbacks,
        mean=health.mean + share * difference,
        variance=jnp.where(good, (1 - share) * (health.variance + share * difference**2), health.variance),
    )
    return good, judged


def metrics(health: Health) -> dict[str, Float[Array, ""]]:
    """What a step reports of it."""
    return {"train/skipped_steps": health.skipped, "train/skipped_in_a_row": health.skipped_in_a_row}
