"""Contrastive losses over the pairs of a global batch: pair i is row i of both embeddings."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from mmjax.objectives import ring

Result = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


def sigmoid(outputs: Mapping[str, Any], batch: Mapping[str, Array], rng: Array, chunk: int = 0) -> Result:
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, algorithm 1).

    Args:
      outputs: what `MultimodalModel` returns for a batch with `image` and `text`.
      batch: rows whose `has_text` is False (records without a caption) take no part, where it is there.
      rng: not used.
      chunk: texts that a device compares with its images at a time; 0 for a good number.

    Returns:
      The sum over all pairs divided by the number of rows, and the metrics.
    """
    image, text = outputs["image"]["embedding"], outputs["text"]["embedding"]
    loss, accuracy = ring.sigmoid(
        image, text, outputs["logit_scale"], outputs["logit_bias"], chunk, batch.get("has_text")
    )
    return loss, _metrics(outputs, accuracy)


def softmax(outputs: Mapping[str, Any], batch: Mapping[str, Array], rng: Array, chunk: int = 0) -> Result:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    Args, returns: as `sigmoid`; the loss is the mean over both directions and all rows.
    """
    image, text = outputs["image"]["embedding"], outputs["text"]["embedding"]
    loss, accuracy = ring.softmax(image, text, outputs["logit_scale"], chunk, batch.get("has_text"))
    return loss, _metrics(outputs, accuracy)


def _metrics(outputs: Mapping[str, Any], accuracy: Float[Array, ""]) -> dict[str, Float[Array, ""]]:
    return {
        "batch_accuracy": accuracy,
        "logit_scale": outputs["logit_scale"],
        "logit_bias": outputs["logit_bias"],
    }
