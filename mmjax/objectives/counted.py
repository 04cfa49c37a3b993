"""Means over what counts: rows, pairs or tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax.objectives.contrastive import Result


def mean_result(counted: Bool[Array, "..."], losses: Float[Array, "..."], right: Bool[Array, "..."]) -> Result:
    """The mean of the losses that are `counted`, 0 without any; `accuracy`, the share of them that is right; `count`,
    their number.
    """
    weights = counted.astype(jnp.float32)
    count = weights.sum()
    loss, accuracy = ((weights * values).sum() / jnp.maximum(count, 1) for values in (losses, right))
    return loss, {"accuracy": accuracy, "count": count}
