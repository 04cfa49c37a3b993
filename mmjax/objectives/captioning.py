"""Captioning: predict each token of the text from the image and the tokens before it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.models.outputs import Outputs
from mmjax.objectives.contrastive import Result
from mmjax.objectives.counted import mean_result


def captioning(
    outputs: Outputs,
    batch: Mapping[str, Array],
    rng: Array,
    parallel: float = 0.0,
    label_smoothing: float = 0.0,
) -> Result:
    """The captioning loss of CoCa (Yu et al. 2022, eq. 3), Cap and CapPa (Tschannen et al. 2023, section 3.1).

    Args:
      outputs: of a model with a decoder.
      batch: `text` int32 [batch, length] and `rng`, a key for each row.
      rng: not used.
      parallel: the probability that a row is predicted all at once from the image alone (CapPa: 0.75).
      label_smoothing: the share of each label that is spread over the whole vocabulary (BLIP: 0.1).

    Returns:
      The mean cross-entropy of the tokens that are no padding, the end token included, and `accuracy`, the share of
      them that is likeliest; `count` is their number.
    """
    ids, at_once = batch["text"], None
    if parallel:
        at_once = jax.vmap(lambda key: jax.random.bernoulli(key, parallel))(batch["rng"])
    logits = outputs.caption(outputs.text, outputs["image"]["tokens"], at_once)
    labels, counted = labels_of(ids, logits, outputs.pad_id)
    if "has_text" in batch:
        counted &= batch["has_text"][:, None]
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    wanted = (1 - label_smoothing) * own + label_smoothing * logits.mean(axis=-1) if label_smoothing else own
    losses = jax.nn.logsumexp(logits, axis=-1) - wanted  # the whole vocabulary's log-probabilities are never kept
    return mean_result(counted, losses, logits.argmax(axis=-1) == labels)


def labels_of(
    ids: Int[Array, "batch length"], logits: Float[Array, "batch slots vocab"], pad_id: int
) -> tuple[Int[Array, "batch slots"], Bool[Array, "batch slots"]]:
    """The token that each slot of the decoder predicts, and whether it is no padding."""
    labels = ids[:, ids.shape[1] - logits.shape[1] :]
    return labels, labels != pad_id
