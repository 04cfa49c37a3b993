"""Masked language modelling: fill in words that are hidden, from the rest of the text and the image."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.models.outputs import Outputs, Vocabulary
from mmjax.objectives.contrastive import Result
from mmjax.objectives.counted import mean_result


def masked(
    outputs: Outputs,
    batch: Mapping[str, Array],
    rng: Array,
    probability: float = 0.15,
    teacher_weight: float = 0.0,
) -> Result:
    """The masked language modelling of BERT (Devlin et al. 2019, section 3.1) given the image ("Align before Fuse", Li
    et al. 2021, section 3.2, eq. 3), of whole words. A batch without images is filled in from the text alone.

    Args:
      outputs: of a model with a fusion.
      batch: `text` int32 [batch, length] and `rng`, a key for each row.
      rng: not used.
      probability: that a word is to be predicted.
      teacher_weight: the share of the teacher's prediction in the labels (momentum distillation, section 3.3, eq. 7).

    Returns:
      The mean cross-entropy of the chosen tokens and `accuracy`, the share of them that is likeliest; `count` is their
      number.
    """
    ids, vocabulary = batch["text"], outputs.vocabulary
    chosen = choose_words(batch["rng"], ids, vocabulary, probability)
    hidden = hide(batch["rng"], ids, chosen, vocabulary)
    image = outputs["image"]["tokens"] if "image" in batch else None
    logits = outputs.predict(outputs.read(hidden), image)
    wanted = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    if teacher_weight:
        teacher = outputs["teacher"]
        image = teacher["image"]["tokens"] if "image" in batch else None
        shares = jax.lax.stop_gradient(jax.nn.softmax(teacher.predict(teacher.read(hidden), image)))
        wanted = (1 - teacher_weight) * wanted + teacher_weight * (shares * logits).sum(axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - wanted
    return mean_result(chosen, losses, logits.argmax(axis=-1) == ids)


def choose_words(
    keys: Key[Array, " batch"], ids: Int[Array, "batch length"], vocabulary: Vocabulary, probability: float
) -> Bool[Array, "batch length"]:
    """Marks all tokens of the words that are drawn; special tokens are never marked."""
    starts, ends, special = (jnp.asarray(marks)[ids] for marks in vocabulary[1:])
    after_end = jnp.pad((ends | special)[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    words = (starts | after_end).cumsum(axis=1) - 1  # the number of each token's word in its row
    draws = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 0), probability, ids.shape[1:]))(keys)
    return jnp.take_along_axis(draws, words, axis=1) & ~special


def hide(
    keys: Key[Array, " batch"],
    ids: Int[Array, "batch length"],
    chosen: Bool[Array, "batch length"],
    vocabulary: Vocabulary,
) -> Int[Array, "batch length"]:
    """Of the chosen tokens 80 % become the mask token, 10 % any other token, and 10 % stay."""
    ordinary = jnp.asarray((~vocabulary.special).nonzero()[0])

    def one(key: Array) -> tuple[Float[Array, " length"], Int[Array, " length"]]:
        shape = ids.shape[1:]
        return (
            jax.random.uniform(jax.random.fold_in(key, 1), shape),
            jax.random.randint(jax.random.fold_in(key, 2), shape, 0, len(ordinary)),
        )

    fate, others = jax.vmap(one)(keys)
    replaced = jnp.where(fate < 0.8, vocabulary.mask_id, jnp.where(fate < 0.9, ordinary[others], ids))
    return jnp.where(chosen, replaced, ids).astype(ids.dtype)
