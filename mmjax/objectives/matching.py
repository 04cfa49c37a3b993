"""Image-text matching: does this text belong to this image?"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.models.multimodal import Text
from mmjax.models.outputs import Outputs
from mmjax.objectives.contrastive import Result
from mmjax.objectives.counted import mean_result


def matching(outputs: Outputs, batch: Mapping[str, Array], rng: Array) -> Result:
    """The matching loss of "Align before Fuse" (Li et al. 2021, section 3.2, eq. 4) with in-batch hard negatives.

    Each image meets its own text, a text of another image, and each text another image. What is wrong for it is drawn
    among the rows at hand by the contrastive similarity, so that the most similar are the likeliest; never the pair
    itself nor a row with the same text.

    Args:
      outputs: of a model with a fusion.
      batch: `text` int32 [batch, length] and `rng`, a key for each row; `has_text` where rows may lack it.
      rng: not used.

    Returns:
      The mean cross-entropy over all pairs, and `accuracy`; `count` is the number of pairs.
    """
    ids, image, text = batch["text"], outputs["image"], outputs.text
    similarity = outputs["logit_scale"] * image["embedding"] @ outputs["text"]["embedding"].T
    usable = wrong_pairs(ids, batch.get("has_text"))
    keys = jax.vmap(lambda key: jax.random.split(key))(batch["rng"])
    wrong_text = draw(keys[:, 0], jax.lax.stop_gradient(similarity), usable)
    wrong_image = draw(keys[:, 1], jax.lax.stop_gradient(similarity).T, usable)

    def rows(text: Text, places: Int[Array, " batch"]) -> Text:
        return jax.tree.map(lambda x: x[places], text)

    # One pass of the fusion for all three kinds of pairs.
    texts = jax.tree.map(lambda *x: jnp.concatenate(x), text, text, rows(text, wrong_text))
    images = jnp.concatenate([image["tokens"], image["tokens"][wrong_image], image["tokens"]])
    logits = outputs.match(texts, images)
    labels = jnp.repeat(jnp.array([1, 0, 0]), len(ids), total_repeat_length=3 * len(ids))
    there = jnp.ones(len(ids), bool) if batch.get("has_text") is None else batch["has_text"]
    has_wrong = usable.any(axis=1)
    counted = jnp.concatenate([there, has_wrong, has_wrong])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return mean_result(counted, losses, logits.argmax(axis=1) == labels)


def wrong_pairs(
    ids: Int[Array, "batch length"], has_text: Bool[Array, " batch"] | None = None
) -> Bool[Array, "batch batch"]:
    """Which pairs of an image (row) and a text (column) do not belong together: the texts are not the same."""
    same = (ids[:, None, :] == ids[None, :, :]).all(axis=2)
    if has_text is None:
        return ~same
    return ~same & has_text[:, None] & has_text[None, :]


def draw(
    keys: Key[Array, " batch"], similarity: Float[Array, "batch batch"], usable: Bool[Array, "batch batch"]
) -> Int[Array, " batch"]:
    """A column for each row, with probabilities that are the softmax of the usable similarities."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (similarity.shape[1],)))(keys)
    return jnp.where(usable, similarity + noise, -jnp.inf).argmax(axis=1)
