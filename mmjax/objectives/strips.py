"""Going through the pairs of a global batch: each device compares its images with a strip of the texts at a time."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from mmjax.sharding.collectives import ROW_AXES, ROWS, ring, varying

# Texts compared at a time where the config does not say. A strip of 1,024 keeps a matrix unit busy, and is no larger
# than a few of the embeddings themselves.
DEFAULT_CHUNK = 1024

Embeddings = Float[Array, "rows width"]
Scalar = Float[Array, ""]
Valid = Bool[Array, " rows"] | None


class Strip(NamedTuple):
    """A device's images against some texts.

    Logits are -inf where the image or the text is not valid, or the text only fills up the last strip.
    """

    logits: Float[Array, "rows chunk"]
    positive: Bool[Array, "rows chunk"]
    text: Float[Array, "chunk width"]


def on_devices(function: Callable, chunk: int, with_gradient: bool, *arguments: Array | None) -> tuple:
    """On each device: `function` of its rows of what has rows. The value, and the gradients where asked for."""
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError("no mesh is set: call the objective inside `with jax.set_mesh(mesh):`")
    value, scalar = (jax.P(), jax.P()), jax.P()
    inputs = jax.tree.map(lambda x: ROWS if jnp.ndim(x) else scalar, arguments)
    outputs = (value, (ROWS, ROWS, scalar, scalar)) if with_gradient else value
    function = partial(function, chunk=chunk, with_gradient=with_gradient)
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs)(*arguments)


def strips(
    visit: Callable,
    scaled: Embeddings,
    text: Embeddings,
    bias: Scalar,
    valid: Valid,
    chunk: int,
    kept: PyTree[Array],
    columns: PyTree[Array],
    summed: PyTree[Array],
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Visits all strips of this device's rows: `visit(kept, summed, strip, columns) -> (kept, summed)`.

    `columns` and `summed` hold one entry for each text; `visit` sees those of the strip. `kept` and `summed` start as
    the same constants on each device.
    """
    rows, width = len(scaled), min(chunk or DEFAULT_CHUNK, len(scaled))
    count = -(-rows // width)
    width = -(-rows // count)  # strips of one size, as little filled up as can be
    filling = count * width - rows

    def split(x: Array) -> Array:
        return jnp.pad(x, ((0, filling), *((0, 0),) * (x.ndim - 1))).reshape(count, width, *x.shape[1:])

    numbers, own = jnp.arange(count * width).reshape(count, width), jax.lax.axis_index(ROW_AXES)

    def at_device(kept: PyTree, sent: PyTree, summed: PyTree, owner: Array) -> tuple[PyTree, PyTree]:
        def at_strip(kept: PyTree, inputs: tuple) -> tuple[PyTree, PyTree]:
            numbers, (text, valid_text, columns), summed = inputs
            logits = scaled @ text.T + bias
            positive = (owner == own) & (jnp.arange(rows)[:, None] == numbers)
            if valid is not None:  # what fills up the last strip is not valid either
                logits = jnp.where(valid[:, None] & valid_text, logits, -jnp.inf)
                positive &= valid_text
            elif filling:
                logits = jnp.where(numbers < rows, logits, -jnp.inf)
            return visit(kept, summed, Strip(logits, positive, text), columns)

        return jax.lax.scan(at_strip, kept, (numbers, sent, summed))

    sent, summed = jax.tree.map(split, ((text, valid, columns), varying(summed)))
    kept, summed = ring(at_device, varying(kept), sent, summed)
    return kept, jax.tree.map(lambda x: x.reshape(count * width, *x.shape[2:])[:rows], summed)


def mean(values: Float[Array, " rows"] | Bool[Array, " rows"], valid: Valid) -> Scalar:
    """Over the rows of all devices that take part; 0 where none do."""
    if valid is None:
        return jax.lax.pmean(values.mean(), ROW_AXES)
    return jax.lax.psum(jnp.where(valid, values, 0.0).sum(), ROW_AXES) / _count(len(values), valid)


def _count(rows: int, valid: Valid) -> int | Scalar:
    """The rows of all devices that take part; 1 where none do, for it divides."""
    if valid is None:
        return rows * jax.lax.axis_size(ROW_AXES)
    return jnp.maximum(jax.lax.psum(valid.sum(), ROW_AXES), 1)


def gradients_of_mean(
    image: Embeddings, scale: Scalar, valid: Valid, for_image: Embeddings, for_text: Embeddings, slope: Array
) -> tuple:
    """Of the mean over all rows, with respect to image, text, scale and bias.

    `for_image` is the sum of slope x text, `for_text` that of slope x scaled image, `slope` each row's sum; since a
    cosine is image . text, the sum of slope x cosine is that of image . for_image.
    """
    count, for_scale = _count(len(image), valid), (image * for_image).sum(axis=1)
    return for_image * (scale / count), for_text / count, mean(for_scale, valid), mean(slope, valid)
