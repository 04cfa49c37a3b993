"""Few-shot classification: ridge regression on the features of a few images of each class."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mmjax.api import Model
from mmjax.evaluators.labelled import Labelled, Split, correct, places_in_class

BIAS = 100.0  # the constant feature: so large that its weight is hardly penalised
EPSILON = 1e-5  # added to standard deviations


class FewShot(Labelled):
    """The evaluator `few_shot`; its fields are those of `mmjax.config.few_shot`.

    Seed s draws an order of each class's images; N shots are the first N of it, or all where there are fewer.
    """

    def open(self, beat: Callable[[], None] = lambda: None) -> None:
        """See `Labelled.open`."""
        super().open(beat)
        self._places = np.stack([places_in_class(self._train_labels, seed) for seed in range(self._entry.seeds)])

    def evaluate(self, model: Model, picture: Path | None = None) -> Iterator[tuple[str, float]]:
        """Yields `few_shot_N_top1` for each number of shots, the mean over seeds, and `few_shot_N_top1_std`."""
        used = np.flatnonzero((self._places < max(self._entry.shots)).any(axis=0))
        train, test = yield from self._features(model, used)
        for shots in self._entry.shots:
            found = []
            for places in self._places[:, used]:
                chosen = Split(train.features[places < shots], train.labels[places < shots])
                weights, bias = fit(chosen, self._class_count, self._entry.l2)
                found.append(correct(test.features @ weights + bias, test.labels).mean())
                self._beat()
            yield f"few_shot_{shots}_top1", float(np.mean(found))
            yield f"few_shot_{shots}_top1_std", float(np.std(found))


def fit(
    train: Split, classes: int, l2: float
) -> tuple[Float[np.ndarray, "width classes"], Float[np.ndarray, " classes"]]:
    """Weights and bias (float64) of ridge regression, in closed form, onto 1 for the class and -1 for the others.

    As big_vision's evaluator `fewshot_lsr` defines it: features are standardised by the mean and the standard deviation
    of the training images, and get a constant one of 100; then it minimises |features @ weights - targets|^2 + l2 *
    |weights|^2. What is returned applies to features as they are.
    """
    features = train.features.astype(np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0) + EPSILON
    x = np.concatenate([(features - mean) / deviation, np.full((len(features), 1), BIAS)], axis=1)
    y = np.where(train.labels[:, None] == np.arange(classes), 1.0, -1.0)
    if len(x) >= x.shape[1]:
        solution = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)
    else:  # the same, from a smaller matrix
        solution = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(len(x)), y)
    weights = solution[:-1] / deviation[:, None]
    return weights, BIAS * solution[-1] - mean @ weights
