"""The contrastive losses over all pairs of a global batch, of which no device ever holds more than a strip.

Each device has its rows of both embeddings. The texts go round, and at each stop a device compares its images with some
of them at a time: memory is O(rows of a device x (chunk + width)), forward and backward. The losses bring their own
gradients, because automatic differentiation would save every strip.
"""

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
Value = tuple[Scalar, Scalar]


class Strip(NamedTuple):
    """A device's images against some texts. Logits of texts that only fill up the last strip are -inf."""

    logits: Float[Array, "rows chunk"]
    positive: Bool[Array, "rows chunk"]
    text: Float[Array, "chunk width"]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def sigmoid(image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, chunk: int = 0) -> Value:
    """The pairwise sigmoid loss ("Sigmoid Loss for Language Image Pre-Training", Zhai et al. 2023, sections 3.2, 3.3).

    Args:
      image, text: float32, rows over the mesh axes `data` and `fsdp`; pair i is row i of both.
      scale, bias: logits are scale * cosine + bias.
      chunk: texts compared at a time, 0 for a good number.

    Returns:
      The sum over all pairs divided by the number of rows; the share of images whose own text has the largest logit
      (no gradient).
    """
    return _sharded(partial(_sigmoid, chunk=chunk, with_gradient=False), gradients=False)(image, text, scale, bias)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def softmax(image: Embeddings, text: Embeddings, scale: Scalar, chunk: int = 0) -> Value:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3): the mean over rows and both directions.

    Args, returns: as `sigmoid`.
    """
    run = _sharded(partial(_softmax, chunk=chunk, with_gradient=False), gradients=False)
    return run(image, text, scale, jnp.zeros(()))


def _sigmoid_forward(image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, chunk: int) -> tuple:
    return _sharded(partial(_sigmoid, chunk=chunk, with_gradient=True), gradients=True)(image, text, scale, bias)


def _softmax_forward(image: Embeddings, text: Embeddings, scale: Scalar, chunk: int) -> tuple:
    run = _sharded(partial(_softmax, chunk=chunk, with_gradient=True), gradients=True)
    value, gradients = run(image, text, scale, jnp.zeros(()))
    return value, gradients[:3]


def _backward(chunk: int, gradients: tuple[Array, ...], cotangents: Value) -> tuple[Array, ...]:
    return tuple(cotangents[0] * gradient for gradient in gradients)


sigmoid.defvjp(_sigmoid_forward, _backward)
softmax.defvjp(_softmax_forward, _backward)


def _sharded(function: Callable, gradients: bool) -> Callable:
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError("no mesh is set: call the objective inside `with jax.set_mesh(mesh):`")
    value, scalar = (jax.P(), jax.P()), jax.P()
    specs = (value, (ROWS, ROWS, scalar, scalar)) if gradients else value
    return jax.shard_map(function, in_specs=(ROWS, ROWS, scalar, scalar), out_specs=specs)


def _sigmoid(image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, chunk: int, with_gradient: bool):
    """On one device: `sigmoid`'s value, and its gradients where asked for."""
    scaled, rows = image * scale, len(image)

    def visit(kept: dict, summed: dict, strip: Strip, _) -> tuple[dict, dict]:
        # -log sigmoid(z) = softplus(-z), with z = logit for a pair and -logit for any other two.
        opposed = jnp.where(strip.positive, -strip.logits, strip.logits)
        new = _best(kept, strip) | {"loss": kept["loss"] + jax.nn.softplus(opposed).sum(axis=1)}
        if with_gradient:
            slope = jax.nn.sigmoid(opposed)
            slope = jnp.where(strip.positive, -slope, slope)
            new["slope"] = kept["slope"] + slope.sum(axis=1)
            new["image"] = kept["image"] + slope @ strip.text
            summed = {"text": summed["text"] + slope.T @ scaled}
        return new, summed

    kept = _best_of_none(rows) | {"loss": jnp.zeros(rows)}
    if with_gradient:
        kept |= {"slope": jnp.zeros(rows), "image": jnp.zeros(image.shape)}
    summed = {"text": jnp.zeros(text.shape)} if with_gradient else {}
    kept, summed = _strips(visit, scaled, text, bias, chunk, kept, {}, summed)
    value = _mean(kept["loss"]), _mean(kept["own"] >= kept["best"])
    if not with_gradient:
        return value
    return value, _gradients(image, scale, kept["image"], summed["text"], kept["slope"])


def _softmax(image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, chunk: int, with_gradient: bool):
    """On one device: `softmax`'s value, and its gradients where asked for. `bias` is 0: it would cancel."""
    scaled, rows = image * scale, len(image)

    def normalize(kept: dict, summed: dict, strip: Strip, _) -> tuple[dict, dict]:
        row, column = (jax.nn.logsumexp(strip.logits, axis=axis) for axis in (1, 0))
        kept = _best(kept, strip) | {"normalizer": jnp.logaddexp(kept["normalizer"], row)}
        return kept, {"normalizer": jnp.logaddexp(summed["normalizer"], column)}

    nothing = jnp.full(rows, -jnp.inf)
    kept = _best_of_none(rows) | {"normalizer": nothing}
    kept, columns = _strips(normalize, scaled, text, bias, chunk, kept, {}, {"normalizer": nothing})
    normalizer = kept["normalizer"]
    value = _mean((normalizer + columns["normalizer"]) / 2 - kept["own"]), _mean(kept["own"] >= kept["best"])
    if not with_gradient:
        return value

    def differentiate(kept: Array, summed: Array, strip: Strip, columns: dict) -> tuple[Array, Array]:
        row, column = jnp.exp(strip.logits - normalizer[:, None]), jnp.exp(strip.logits - columns["normalizer"])
        slope = (row + column) / 2 - strip.positive
        return kept + slope @ strip.text, summed + slope.T @ scaled

    start = jnp.zeros(image.shape), columns, jnp.zeros(text.shape)
    for_image, for_text = _strips(differentiate, scaled, text, bias, chunk, *start)
    return value, _gradients(image, scale, for_image, for_text, jnp.zeros(rows))


def _best_of_none(rows: int) -> dict[str, Float[Array, " rows"]]:
    return {"best": jnp.full(rows, -jnp.inf), "own": jnp.zeros(rows)}


def _best(kept: dict, strip: Strip) -> dict[str, Float[Array, " rows"]]:
    """Each image's largest logit so far, and that of its own text."""
    own = jnp.where(strip.positive, strip.logits, 0.0).sum(axis=1)
    return {"best": jnp.maximum(kept["best"], strip.logits.max(axis=1)), "own": kept["own"] + own}


def _mean(values: Float[Array, " rows"] | Bool[Array, " rows"]) -> Scalar:
    return jax.lax.pmean(values.mean(), ROW_AXES)


def _gradients(image: Embeddings, scale: Scalar, for_image: Embeddings, for_text: Embeddings, slope: Array) -> tuple:
    """Of the mean over all rows, with respect to image, text, scale and bias.

    `for_image` is the sum of slope x text, `for_text` that of slope x scaled image, `slope` each row's sum; since a
    cosine is image . text, the sum of slope x cosine is that of image . for_image.
    """
    rows = len(image) * jax.lax.axis_size(ROW_AXES)
    return for_image * (scale / rows), for_text / rows, _mean((image * for_image).sum(axis=1)), _mean(slope)


def _strips(
    visit: Callable,
    scaled: Embeddings,
    text: Embeddings,
    bias: Scalar,
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
            numbers, (text, columns), summed = inputs
            logits = scaled @ text.T + bias
            if filling:
                logits = jnp.where(numbers < rows, logits, -jnp.inf)
            positive = (owner == own) & (jnp.arange(rows)[:, None] == numbers)
            return visit(kept, summed, Strip(logits, positive, text), columns)

        return jax.lax.scan(at_strip, kept, (numbers, sent, summed))

    sent, summed = jax.tree.map(split, ((text, columns), varying(summed)))
    kept, summed = ring(at_device, varying(kept), sent, summed)
    return kept, jax.tree.map(lambda x: x.reshape(count * width, *x.shape[2:])[:rows], summed)
