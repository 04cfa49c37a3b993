"""Linear probe: multinomial logistic regression on frozen image features.

The protocol is that of "Learning Transferable Visual Models From Natural Language Supervision" (CLIP, Radford et al.
2021, section 3.2 and appendix A.3): L-BFGS, at most 1,000 iterations; the strength of the L2 penalty is searched for on
a held-out part of the training images, and the classifier then fitted to all of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from mmjax.api import Model
from mmjax.errors import UserError
from mmjax.evaluators import calibration, recalls
from mmjax.evaluators.labelled import Labelled, Split, correct, place, places_in_class
from mmjax.evaluators.zeroshot import mean_per_class_recall

HELD_OUT = 5  # one of so many images of each class
STEPS_PER_DECADE = 8
FIRST_STEP, DECADES = 2, 6  # in decades: 1e-6, 1e-4, ..., 1e6
SOLVER = optax.lbfgs()
BLOCK = 50  # iterations
TOLERANCE = 1e-7  # of the gradient's largest entry
Search = tuple[Array, PyTree, Array]  # weights, the solver's state, the gradient's largest entry


class LinearProbe(Labelled):
    """The evaluator `linear_probe`; its fields are those of `mmjax.config.linear_probe`."""

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """See `Labelled.open`.

        Raises:
          UserError: also where no class has enough images to hold one out.
        """
        super().open(beat)
        self._held_out = places_in_class(self._train_labels, seed=0) % HELD_OUT == HELD_OUT - 1
        if not self._entry.l2 and not self._held_out.any():
            raise UserError(
                f'no class of split "{self._entry.train_split}" has {HELD_OUT} images, to hold one out: set l2'
            )

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields top-1 accuracy, mean per-class recall, expected calibration error, and the L2 strength.

        With a picture's path it writes each class's recall beside it (.csv).
        """
        train, test = yield from self._features(model)
        probe = Regression(train, self._class_count, model.mesh, self._entry.max_iterations, self._beat)
        held_out = Split(*(part[self._held_out] for part in train))

        def score(l2: float) -> float:
            right = correct(scores(probe.fit(l2, ~self._held_out), held_out.features), held_out.labels)
            return model.agreed(right).mean()

        l2 = self._entry.l2 or search(score)
        logits = scores(probe.fit(l2), test.features)
        right = correct(logits, test.labels)
        yield "linear_probe_top1", float(right.mean())
        yield "linear_probe_mean_per_class_recall", mean_per_class_recall(test.labels, right)
        bins = calibration.binned(calibration.confidences(logits), right, self._entry.calibration_bins)
        yield "linear_probe_expected_calibration_error", bins.error
        yield "linear_probe_l2", float(l2)
        if picture is not None:
            recalls.write(picture.with_suffix(".csv"), self._class_names, test.labels, right)


class Regression:
    """Logistic regression on a split's images, which are split over the devices of `mesh`.

    `beat` is called every so many iterations.
    """

    def __init__(
        self,
        train: Split,
        classes: int,
        mesh: Mesh,
        max_iterations: int = 1000,
        beat: Callable[[], None] = lambda: None,
    ):
        self._classes, self._mesh, self._max_iterations, self._beat = classes, mesh, max_iterations, beat
        self._mean, self._variance = train.features.mean(axis=0), train.features.var(axis=0)
        self._count = len(train.features)
        self._placed = {
            "features": place(mesh, train.features - self._mean),
            "labels": place(mesh, train.labels.astype(np.int32)),
        }

    def fit(
        self, l2: float, used: Bool[np.ndarray, " images"] | None = None
    ) -> Float[np.ndarray, "width_and_bias classes"]:
        """The weights, and in the last row the biases, that minimise

            sum over images of -log softmax(features @ weights + bias)[label]  +  l2 / 2 * |weights|^2

        It is scikit-learn's LogisticRegression with C = 1 / l2, which is positive; biases are not penalised. L-BFGS
        starts from zeros. Of the images, those that are `used` count, by default all.
        """
        used = np.ones(self._count, bool) if used is None else used
        # The same minimum in coordinates in which L-BFGS in float32 comes close to it, and soon.
        scale = np.sqrt(self._variance + l2 / used.sum())
        data = self._placed | {
            "shares": place(self._mesh, (used / used.sum()).astype(np.float32)),
            "scale": place(self._mesh, scale.astype(np.float32), split=False),
            "l2": place(self._mesh, np.array(l2 / used.sum(), np.float32), split=False),
        }
        replicated = NamedSharding(self._mesh, P())
        zeros = place(self._mesh, np.zeros((len(scale) + 1, self._classes), np.float32), split=False)
        found = jax.jit(_start, out_shardings=replicated)(zeros)
        for start in range(0, self._max_iterations, BLOCK):
            steps = min(BLOCK, self._max_iterations - start)
            found = jax.jit(_iterate, out_shardings=replicated)(found, steps, data)
            self._beat()
            if not jax.device_get(found[2]) > TOLERANCE:
                break
        weights = jax.device_get(found[0]).astype(np.float64)
        weights[:-1] /= scale[:, None]
        weights[-1] -= self._mean @ weights[:-1]
        return weights.astype(np.float32)


def _start(weights: Float[Array, "width_and_bias classes"]) -> Search:
    return weights, SOLVER.init(weights), jnp.full((), jnp.inf)


def _iterate(search: Search, steps: int, data: dict[str, Array]) -> Search:
    """So many iterations of L-BFGS, or fewer where the gradient becomes small enough."""
    loss = partial(_loss, **data)

    def iterate(carry: tuple[int, Search]) -> tuple[int, Search]:
        done, (weights, state, _) = carry
        value, gradient = optax.value_and_grad_from_state(loss)(weights, state=state)
        update, state = SOLVER.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        largest = jnp.abs(optax.tree.get(state, "grad")).max()
        return done + 1, (optax.apply_updates(weights, update), state, largest)

    def goes_on(carry: tuple[int, Search]) -> Array:
        return (carry[0] < steps) & (carry[1][2] > TOLERANCE)

    return jax.lax.while_loop(goes_on, iterate, (0, search))[1]


def _loss(
    weights: Float[Array, "width_and_bias classes"],
    features: Float[Array, "images width"],
    labels: Int[Array, " images"],
    shares: Float[Array, " images"],
    scale: Float[Array, " width"],
    l2: Float[Array, ""],
) -> Float[Array, ""]:
    """The mean loss with its penalty, of weights times `scale`.

    `shares` is one over the number of images that count, and 0 for the others and for rows that fill them up.
    """
    own_weights = weights[:-1] / scale[:, None]
    logits = jnp.matmul(features, own_weights, precision="highest") + weights[-1]
    right = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    own = jnp.where(right, logits, 0).sum(axis=1)
    others = jax.nn.logsumexp(jnp.where(right, -jnp.inf, logits), axis=1)
    losses = jax.nn.softplus(others - own)  # small ones, too, keep all their digits
    return (losses * shares).sum() + l2 / 2 * (own_weights**2).sum()


def scores(
    weights: Float[np.ndarray, "width_and_bias classes"], features: Float[np.ndarray, "images width"]
) -> Float[np.ndarray, "images classes"]:
    """The logits of `fit`'s classifier."""
    return features @ weights[:-1] + weights[-1]


def search(score: Callable[[float], float]) -> float:
    """The L2 strength with the highest score, of equal ones the largest.

    CLIP's search: from 1e-6 to 1e6 in steps of two decades; then around the best one so far in steps half as large,
    down to eight steps a decade.
    """
    found, step, last = {}, FIRST_STEP * STEPS_PER_DECADE, DECADES * STEPS_PER_DECADE
    tried = range(-last, last + 1, step)
    while True:
        for exponent in tried:
            if exponent not in found and abs(exponent) <= last:
                found[exponent] = score(10.0 ** (exponent / STEPS_PER_DECADE))
        best = max(found, key=lambda exponent: (found[exponent], exponent))
        if step == 1:
            return 10.0 ** (best / STEPS_PER_DECADE)
        step //= 2
        tried = (best - step, best + step)
