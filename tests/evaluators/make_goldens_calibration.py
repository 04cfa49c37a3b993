"""Writes goldens/calibration.json: what torchmetrics says of the calibration of random zero-shot classifications.

    python -m tests.evaluators.make_goldens_calibration

Needs `torchmetrics`. Embeddings come from numpy's seeds (make_goldens_zeroshot) and are not kept.
"""

import json
from pathlib import Path

import numpy as np

from tests.evaluators import make_goldens_zeroshot as zeroshot

PATH = Path(__file__).with_name("goldens") / "calibration.json"
SCALES = (1.0, 8.0, 25.0)  # of the cosines: too modest, about right, too sure
BINS = (15, 10, 1)


def main() -> None:
    """Computes and writes the goldens."""
    import torch
    import torchmetrics
    from torchmetrics.functional.classification import multiclass_calibration_error

    found = {"torchmetrics": torchmetrics.__version__, "errors": []}
    for name, arguments in zeroshot.CLASSIFICATIONS.items():
        images, classes, labels = zeroshot.classification(*arguments)
        cosines = torch.from_numpy(images.astype(np.float64) @ classes.T.astype(np.float64))
        for scale in SCALES:
            probabilities = torch.softmax(scale * cosines, dim=1)
            for bins in BINS:
                error = multiclass_calibration_error(
                    probabilities, torch.from_numpy(labels), num_classes=len(classes), n_bins=bins, norm="l1"
                )
                found["errors"].append({"name": name, "scale": scale, "bins": bins, "error": float(error)})
    PATH.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
