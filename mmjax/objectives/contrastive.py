"""Contrastive losses over the pairs of a global batch: pair i is row i of both embeddings."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.sharding.rules import constrain

Outputs = Mapping[str, Any]
Result = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


def sigmoid(outputs: Outputs, batch: Mapping[str, Array], rng: Array) -> Result:
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, algorithm 1).

    Args:
      outputs: what `MultimodalModel` returns for a batch with `image` and `text`.
      batch: not read.
      rng: not used.

    Returns:
      The sum over all pairs divided by the batch size, and the metrics.
    """
    logits = _similarities(outputs) * outputs["logit_scale"] + outputs["logit_bias"]
    # -log sigmoid(z) = softplus(-z), with z = logit on the diagonal and -logit off it.
    loss = (jax.nn.softplus(logits).sum() - jnp.trace(logits)) / len(logits)
    return loss, _metrics(outputs, logits)


def softmax(outputs: Outputs, batch: Mapping[str, Array], rng: Array) -> Result:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    Args, returns: as `sigmoid`; the loss is the mean over both directions and all rows.
    """
    logits = _similarities(outputs) * outputs["logit_scale"]
    normalizers = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return (normalizers / 2 - jnp.diagonal(logits)).mean(), _metrics(outputs, logits)


def _similarities(outputs: Outputs) -> Float[Array, "images texts"]:
    """Cosines of all pairs; each device holds the rows of its own images."""
    image = constrain(outputs["image"]["embedding"], "batch", "embed")
    text = constrain(outputs["text"]["embedding"], "batch", "embed")
    return constrain(image @ text.T, "batch", None)


def _metrics(outputs: Outputs, logits: Float[Array, "images texts"]) -> dict[str, Float[Array, ""]]:
    correct = jnp.diagonal(logits) >= logits.max(axis=1)
    return {
        "batch_accuracy": correct.mean(),
        "logit_scale": outputs["logit_scale"],
        "logit_bias": outputs["logit_bias"],
    }
