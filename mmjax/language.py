"""What a model with a head for masked language modelling puts in the place of hidden tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from mmjax.errors import UserError
from mmjax.models.multimodal import MultimodalModel, Text

if TYPE_CHECKING:
    from mmjax.model import Model

BATCH_SIZE = 32
Candidates = list[tuple[str, float]]  # tokens and their probabilities, the likeliest first


def fill_mask(
    model: "Model",
    texts: Sequence[str],
    ids: Int[np.ndarray, "texts length"],
    load_images: Callable[[np.ndarray], np.ndarray] | None,
    top_k: int,
) -> list[list[Candidates]]:
    """For each text, for each of its mask tokens, what it may be: see `Model.fill_mask`.

    `ids` are those of the texts; `load_images` gives the pixels of each text's image, by its number.
    """
    mask_id = model.tokenizer.mask_id
    if mask_id is None:
        raise UserError("the tokenizer has no mask token, so a text cannot say what is hidden in it")
    if not 1 <= top_k <= model.config.model.encoders.text.vocab_size:
        raise UserError(f"top_k: {top_k} is not from 1 to the size of the vocabulary")
    places = [np.flatnonzero(row == mask_id) for row in ids]
    for text, own in zip(texts, places, strict=True):
        if not len(own):
            length = model.config.model.encoders.text.length
            raise UserError(f"{text[:60]!r} has no mask token within the {length} tokens that the model reads")
    if not places:
        return []
    widest = max(map(len, places))
    padded = np.array([np.resize(own, widest) for own in places], np.int32)
    loaders = {"text": lambda rows: ids[rows], "places": lambda rows: padded[rows]}
    if load_images is not None:
        loaders["image"] = load_images
    run = partial(_likeliest, module=model.module, top_k=top_k)
    batches = model.batches(run, len(texts), loaders, min(BATCH_SIZE, len(texts)))
    found = [row for batch in batches for row in zip(*batch, strict=True)]
    return [
        [_named(model, *of_place) for of_place in list(zip(*row, strict=True))[: len(own)]]
        for row, own in zip(found, places, strict=True)
    ]


def _named(model: "Model", probabilities: np.ndarray, ids: np.ndarray) -> Candidates:
    pairs = zip(ids, probabilities, strict=True)
    return [(model.tokenizer.decode([index]), float(probability)) for index, probability in pairs]


@partial(jax.jit, static_argnames=("module", "top_k"))
def _likeliest(params: PyTree, batch: dict[str, Array], module: MultimodalModel, top_k: int) -> tuple[Array, Array]:
    """The largest probabilities at each place, [batch, places, top_k], and whose they are."""

    def apply(method: str, *arguments: Any) -> Any:
        return module.apply({"params": params}, *arguments, method=method)

    text = Text(batch["text"], *apply("tokens", "text", batch["text"]))
    image = apply("tokens", "image", batch["image"])[0] if "image" in batch else None
    logits = apply("predict", text, image, batch["places"])
    found = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    return tuple(jax.lax.with_sharding_constraint(each, P()) for each in map(jnp.asarray, found))
