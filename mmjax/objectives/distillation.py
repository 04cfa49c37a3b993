"""What a student learns from a teacher that has seen the same batch, instead of from the pairs alone.

`outputs["teacher"]` is what the teacher returns for the batch: the embeddings of its towers and its `logit_scale`. The
gradients do not reach into it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmjax.errors import UserError
from mmjax.objectives import ring
from mmjax.objectives.contrastive import Result


def similarity(
    outputs: Mapping[str, Any], batch: Mapping[str, Array], rng: Array, temperature: float = 1.0, chunk: int = 0
) -> Result:
    """The student's similarities of images and texts follow the teacher's.

    The contrastive part of "Align before Fuse" (Li et al. 2021, the section on momentum distillation, equation 6), with
    the temperature of "Distilling the Knowledge in a Neural Network" (Hinton et al. 2015, section 2): the cross-entropy
    of softmax(student's logits / temperature) under softmax(teacher's logits / temperature), over the texts of an image
    and over the images of a text, times temperature^2, so that the gradient's size hardly depends on the temperature.
    Logits are logit_scale * cosine. It compares rows with each other.

    Args:
      outputs: the `embedding`s of `image` and `text` and the `logit_scale`, the student's and `teacher`'s; the widths
        of the two may differ.
      batch: rows whose `has_text` is False take no part, where it is there.
      rng: not used.
      temperature: above 1, the teacher's small similarities count for more.
      chunk: texts that a device compares with its images at a time; 0 for a good number.

    Returns:
      The mean over both directions and all rows. The entropy of the teacher's probabilities is in it: a student that
      agrees with its teacher does not reach 0. The metric `kl` is the loss without it (times temperature^2 too), and
      does.
    """
    teacher = outputs["teacher"]
    cross_entropy, divergence = ring.soft_targets(
        outputs["image"]["embedding"],
        outputs["text"]["embedding"],
        outputs["logit_scale"] / temperature,
        (teacher["image"]["embedding"], teacher["text"]["embedding"], teacher["logit_scale"] / temperature),
        chunk,
        batch.get("has_text"),
    )
    return temperature**2 * cross_entropy, {"kl": temperature**2 * divergence}


def features(
    outputs: Mapping[str, Any], batch: Mapping[str, Array], rng: Array, modalities: Sequence[str] = ("image",)
) -> Result:
    """The student's embeddings point where the teacher's do: 1 - cosine, for each row alone.

    Args:
      outputs: the `embedding` of each modality, of unit norm, the student's and `teacher`'s.
      batch: of rows whose `has_text` is False, the text is left out, where `has_text` is there.
      rng: not used.
      modalities: whose embeddings are compared.

    Returns:
      The mean over the embeddings compared, 0 where there are none; the metric `count`, their number, where texts may
      be left out.

    Raises:
      UserError: the embeddings of student and teacher differ in width.
    """
    distances, counted = jnp.zeros(()), jnp.zeros(())
    for modality in modalities:
        student, teacher = outputs[modality]["embedding"], outputs["teacher"][modality]["embedding"]
        if student.shape != teacher.shape:
            raise UserError(
                f"distillation of {modality} embeddings: the student's are {student.shape[-1]} wide and the teacher's "
                f"{teacher.shape[-1]}; give both the same config.model.embed_dim, or distill their similarities"
            )
        distance = 1 - (student * jax.lax.stop_gradient(teacher)).sum(axis=-1)
        valid = batch.get("has_text") if modality == "text" else None
        distances += distance.sum() if valid is None else jnp.where(valid, distance, 0.0).sum()
        counted += len(distance) if valid is None else valid.sum()
    some_left_out = "text" in modalities and "has_text" in batch
    return distances / jnp.maximum(counted, 1.0), {"count": counted} if some_left_out else {}
