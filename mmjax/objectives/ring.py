"""The contrastive losses over all pairs of a global batch, of which no device ever holds more than a strip.

Each device has its rows of both embeddings. The texts go round, and at each stop a device compares its images with some
of them at a time: memory is O(rows of a device x (chunk + width)), forward and backward. The losses bring their own
gradients, because automatic differentiation would save every strip.

A row that is not `valid` (a record without a caption) takes no part, neither as an image nor as a text: the losses and
their gradients are those of the other rows alone, and 0 where there are none.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mmjax.objectives.strips import Embeddings, Scalar, Strip, Valid, gradients_of_mean, mean, on_devices, strips

Teacher = tuple[Float[Array, "rows teacher_width"], Float[Array, "rows teacher_width"], Scalar]
Value = tuple[Scalar, Scalar]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def sigmoid(
    image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, chunk: int = 0, valid: Valid = None
) -> Value:
    """The pairwise sigmoid loss ("Sigmoid Loss for Language Image Pre-Training", Zhai et al. 2023, sections 3.2, 3.3).

    Args:
      image, text: float32, rows over the mesh axes `data` and `fsdp`; pair i is row i of both.
      scale, bias: logits are scale * cosine + bias.
      chunk: texts compared at a time, 0 for a good number.
      valid: the rows that take part, laid over the mesh as the embeddings are; None for all.

    Returns:
      The sum over all pairs divided by the number of rows; the share of images whose own text has the largest logit
      (no gradient).
    """
    return on_devices(_sigmoid, chunk, False, image, text, scale, bias, valid)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def softmax(image: Embeddings, text: Embeddings, scale: Scalar, chunk: int = 0, valid: Valid = None) -> Value:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3): the mean over rows and both directions.

    Args, returns: as `sigmoid`.
    """
    return on_devices(_softmax, chunk, False, image, text, scale, jnp.zeros(()), valid)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def soft_targets(
    image: Embeddings,
    text: Embeddings,
    scale: Scalar,
    teacher: Teacher,
    chunk: int = 0,
    valid: Valid = None,
) -> Value:
    """The cross-entropy of `softmax` with a teacher's probabilities in the place of the pairs.

    Args:
      image, text, scale, chunk, valid: as `sigmoid`; logits are scale * cosine.
      teacher: its image and text embeddings of the same rows, of any width, and its scale. It gets no gradient.

    Returns:
      The mean over rows and both directions; the same less the entropy of the teacher's probabilities, which is their
      Kullback-Leibler divergence from the student's (no gradient).
    """
    return on_devices(_soft_targets, chunk, False, image, text, scale, jnp.zeros(()), valid, teacher)


def _sigmoid_forward(
    image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, chunk: int, valid: Valid
) -> tuple:
    value, gradients = on_devices(_sigmoid, chunk, True, image, text, scale, bias, valid)
    return value, (*gradients, None)


def _softmax_forward(image: Embeddings, text: Embeddings, scale: Scalar, chunk: int, valid: Valid) -> tuple:
    value, gradients = on_devices(_softmax, chunk, True, image, text, scale, jnp.zeros(()), valid)
    return value, (*gradients[:3], None)


def _soft_targets_forward(
    image: Embeddings, text: Embeddings, scale: Scalar, teacher: Teacher, chunk: int, valid: Valid
) -> tuple:
    value, gradients = on_devices(_soft_targets, chunk, True, image, text, scale, jnp.zeros(()), valid, teacher)
    return value, (*gradients[:3], None, None)


def _backward(chunk: int, gradients: tuple[Array | None, ...], cotangents: Value) -> tuple[Array | None, ...]:
    return tuple(None if gradient is None else cotangents[0] * gradient for gradient in gradients)


sigmoid.defvjp(_sigmoid_forward, _backward)
softmax.defvjp(_softmax_forward, _backward)
soft_targets.defvjp(_soft_targets_forward, _backward)


def _sigmoid(
    image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, valid: Valid, chunk: int, with_gradient: bool
) -> tuple:
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
    kept, summed = strips(visit, scaled, text, bias, valid, chunk, kept, {}, summed)
    value = mean(kept["loss"], valid), mean(kept["own"] >= kept["best"], valid)
    if not with_gradient:
        return value
    return value, gradients_of_mean(image, scale, valid, kept["image"], summed["text"], kept["slope"])


def _softmax(
    image: Embeddings, text: Embeddings, scale: Scalar, bias: Scalar, valid: Valid, chunk: int, with_gradient: bool
) -> tuple:
    """On one device: `softmax`'s value, and its gradients where asked for. `bias` is 0: it would cancel."""
    scaled, rows = image * scale, len(image)

    def normalize(kept: dict, summed: dict, strip: Strip, _) -> tuple[dict, dict]:
        kept = _best(kept, strip) | {"normalizer": _add(kept["normalizer"], strip.logits, 1)}
        return kept, {"normalizer": _add(summed["normalizer"], strip.logits, 0)}

    nothing = jnp.full(rows, -jnp.inf)
    kept = _best_of_none(rows) | {"normalizer": nothing}
    kept, columns = strips(normalize, scaled, text, bias, valid, chunk, kept, {}, {"normalizer": nothing})
    normalizer, columns = _of_valid((kept["normalizer"], columns), valid)
    losses = (normalizer + columns["normalizer"]) / 2 - kept["own"]
    value = mean(losses, valid), mean(kept["own"] >= kept["best"], valid)
    if not with_gradient:
        return value

    def differentiate(kept: Array, summed: Array, strip: Strip, columns: dict) -> tuple[Array, Array]:
        row, column = jnp.exp(strip.logits - normalizer[:, None]), jnp.exp(strip.logits - columns["normalizer"])
        slope = (row + column) / 2 - strip.positive
        return kept + slope @ strip.text, summed + slope.T @ scaled

    start = jnp.zeros(image.shape), columns, jnp.zeros(text.shape)
    for_image, for_text = strips(differentiate, scaled, text, bias, valid, chunk, *start)
    return value, gradients_of_mean(image, scale, valid, for_image, for_text, jnp.zeros(rows))


def _soft_targets(
    image: Embeddings,
    text: Embeddings,
    scale: Scalar,
    bias: Scalar,
    valid: Valid,
    teacher: Teacher,
    chunk: int,
    with_gradient: bool,
) -> tuple:
    """On one device: `soft_targets`' value, and its gradients where asked for. `bias` is 0: it would cancel."""
    scaled, rows = image * scale, len(image)
    teacher_image, teacher_text, teacher_scale = teacher
    teacher_scaled = teacher_image * teacher_scale

    def logits(strip: Strip, columns: dict) -> dict[str, Array]:
        teacher = teacher_scaled @ columns["text"].T
        return {"student": strip.logits, "teacher": jnp.where(jnp.isneginf(strip.logits), -jnp.inf, teacher)}

    def normalize(kept: dict, summed: dict, strip: Strip, columns: dict) -> tuple[dict, dict]:
        both = logits(strip, columns)
        return tuple(
            {name: _add(sums[name], both[name], axis) for name in both} for sums, axis in ((kept, 1), (summed, 0))
        )

    start, columns = {name: jnp.full(rows, -jnp.inf) for name in ("student", "teacher")}, {"text": teacher_text}
    normalizers = strips(normalize, scaled, text, bias, valid, chunk, start, columns, start)
    by_image, by_text = _of_valid(normalizers, valid)

    def compare(kept: dict, summed: dict, strip: Strip, columns: dict) -> tuple[dict, dict]:
        both, new, slope = logits(strip, columns), dict(kept), 0.0
        for normalizer in (jax.tree.map(lambda x: x[:, None], by_image), columns["normalizers"]):
            student, teacher = (both[name] - normalizer[name] for name in ("student", "teacher"))
            target = jnp.exp(teacher)
            # Where the target is 0, the logarithms may be -inf.
            new["loss"] -= jnp.where(target > 0, target * student, 0.0).sum(axis=1) / 2
            new["divergence"] += jnp.where(target > 0, target * (teacher - student), 0.0).sum(axis=1) / 2
            slope += (jnp.exp(student) - target) / 2
        if with_gradient:
            new["image"] += slope @ strip.text
            summed = {"text": summed["text"] + slope.T @ scaled}
        return new, summed

    kept = {"loss": jnp.zeros(rows), "divergence": jnp.zeros(rows)}
    if with_gradient:
        kept["image"] = jnp.zeros(image.shape)
    summed = {"text": jnp.zeros(text.shape)} if with_gradient else {}
    columns |= {"normalizers": by_text}
    kept, summed = strips(compare, scaled, text, bias, valid, chunk, kept, columns, summed)
    value = mean(kept["loss"], valid), mean(kept["divergence"], valid)
    if not with_gradient:
        return value
    return value, gradients_of_mean(image, scale, valid, kept["image"], summed["text"], jnp.zeros(rows))


def _add(normalizer: Float[Array, " entries"], logits: Float[Array, "rows chunk"], axis: int) -> Array:
    """The logarithm of the sum of what is in `normalizer` and the exponentials along `axis`."""
    return jnp.logaddexp(normalizer, jax.nn.logsumexp(logits, axis=axis))


def _of_valid(normalizers: PyTree[Float[Array, " rows"]], valid: Valid) -> PyTree[Float[Array, " rows"]]:
    """Finite also for rows that are not valid, of which every logit is -inf, so that all they give is 0."""
    return normalizers if valid is None else jax.tree.map(lambda x: jnp.where(valid, x, 0.0), normalizers)


def _best_of_none(rows: int) -> dict[str, Float[Array, " rows"]]:
    return {"best": jnp.full(rows, -jnp.inf), "own": jnp.zeros(rows)}


def _best(kept: dict, strip: Strip) -> dict[str, Float[Array, " rows"]]:
    """Each image's largest logit so far, and that of its own text."""
    own = jnp.where(strip.positive, strip.logits, 0.0).sum(axis=1)
    return {"best": jnp.maximum(kept["best"], strip.logits.max(axis=1)), "own": kept["own"] + own}
