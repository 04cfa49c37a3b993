"""Writes goldens/labelled.json: what scikit-learn's classifiers make of a few features.

    python -m tests.evaluators.make_goldens_labelled

Needs `scikit-learn`. The features are not stored: `splits` draws the same ones again.
"""

import json
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).with_name("goldens") / "labelled.json"
CLASSES, WIDTH, SHOWN = 5, 24, 12
STRENGTHS = (0.01, 1.0, 100.0)  # of the linear probe's penalty
NEIGHBOURS = ((1, 0.07), (20, 0.07), (45, 0.5))
RIDGES = ((60, 1024.0), (60, 0.5), (9, 1.0))  # images, strength; fewer images than features, too


def splits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(features float32, labels) of 203 training and 77 test images in overlapping classes of unequal size."""
    rng = np.random.default_rng(7)
    scales, centres = np.exp(rng.normal(size=WIDTH)), rng.normal(size=(CLASSES, WIDTH))

    def draw(count):
        labels = rng.choice(CLASSES, count, p=[0.4, 0.3, 0.15, 0.1, 0.05])
        labels[:CLASSES] = range(CLASSES)
        features = 0.6 * centres[labels] + rng.normal(size=(count, WIDTH)) + 0.5
        return (features * scales).astype(np.float32), labels

    return draw(203), draw(77)


def main() -> None:
    """Computes and writes the goldens."""
    import sklearn
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (test, wanted) = splits()
    x, test = x.astype(np.float64), test.astype(np.float64)
    found = {"scikit-learn": sklearn.__version__, "linear_probe": [], "knn": [], "few_shot": []}
    for l2 in STRENGTHS:
        model = LogisticRegression(C=1 / l2, tol=1e-12, max_iter=100_000).fit(x, y)
        own = model.predict_log_proba(x)[np.arange(len(y)), y]
        loss = -own.sum() + l2 / 2 * (model.coef_**2).sum()
        found["linear_probe"].append(
            {
                "l2": l2,
                "loss": loss,
                "top1": model.score(test, wanted),
                "probabilities": model.predict_proba(test[:SHOWN]).tolist(),
            }
        )
    for k, temperature in NEIGHBOURS:
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda far, t=temperature: np.exp((1 - far) / t)
        ).fit(x, y)
        found["knn"].append(
            {
                "k": k,
                "temperature": temperature,
                "top1": model.score(test, wanted),
                "shares": model.predict_proba(test[:SHOWN]).tolist(),
            }
        )
    for count, l2 in RIDGES:
        mean, deviation = x[:count].mean(axis=0), x[:count].std(axis=0) + 1e-5

        def standard(rows, mean=mean, deviation=deviation):
            return np.concatenate([(rows - mean) / deviation, np.full((len(rows), 1), 100.0)], axis=1)

        targets = 2.0 * np.eye(CLASSES)[y[:count]] - 1
        model = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(standard(x[:count]), targets)
        scores = model.predict(standard(test))
        found["few_shot"].append(
            {
                "images": count,
                "l2": l2,
                "top1": float((scores.argmax(axis=1) == wanted).mean()),
                "scores": scores[:SHOWN].tolist(),
            }
        )
    GOLDENS.parent.mkdir(exist_ok=True)
    GOLDENS.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
