"""What smaller weights cost and save: bfloat16 and eight-bit integers beside float32.

    python -m mmjax.main --config=configs/quickstart.py
    python benchmarks/weights.py --json=weights.json

Loads a run's last checkpoint with each type of weights (`mmjax.load(..., weights=TYPE)`), and of each tells

    TYPE/parameter_bytes             on the device
    TYPE/text_to_image_R@1           of the 400 held-out emoji; and image_to_text_R@1
    TYPE/image_cosine_distance_mean  1 - the cosine of an embedding and the float32 model's of the same image, mean and
    TYPE/image_cosine_distance_max   largest over all 3,944 emoji; and text_cosine_distance_mean, ..._max
    TYPE/text_to_image_same_first    the share of all captions that find the same image first, among all, as with
                                     float32; and image_to_text_same_first
    TYPE/image_seconds               encoding 3,944 decoded images, the fastest of 5 rounds; and text_seconds

What the model computes in stays the same, on a CPU float32.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from mmjax import runtime
from mmjax.errors import UserError

ROUNDS = 5


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart", help="the run whose last checkpoint is loaded")
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    import report  # beside this file, where a program finds it but a test does not

    runtime.configure()
    try:
        metrics = measure(arguments.workdir)
    except UserError as error:
        parser.error(str(error))
    report.print_table(metrics, f"Smaller weights of {arguments.workdir}")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def measure(workdir: str, split: str = "all") -> dict[str, float]:
    """All metrics; cosines and times are of this split of the emoji."""
    import jax

    from mmjax import api, quantization
    from mmjax import config as configs
    from mmjax.evaluators import Evaluation

    evaluation = Evaluation({"test": configs.retrieval(source="openmoji:en", match="record")})
    models = {weights: api.load(workdir, weights=weights) for weights in quantization.WEIGHTS}
    inputs = make_inputs(models["float32"], split)
    embeddings = {weights: encode(model, inputs)[0] for weights, model in models.items()}
    seconds = fastest(models, inputs)
    found = {}
    for weights, model in models.items():
        own = {"parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))}
        recalls = evaluation.run(["test"], model, Path(tempfile.gettempdir()))
        own |= {name: recalls[f"eval/test/{name}"] for name in ("text_to_image_R@1", "image_to_text_R@1")}
        own |= compare(embeddings[weights], embeddings["float32"])
        own |= {f"{modality}_seconds": round(value, 3) for modality, value in seconds[weights].items()}
        found |= {f"{weights}/{name}": value for name, value in own.items()}
    return found


def make_inputs(model, split: str) -> dict[str, np.ndarray]:
    """All images as the tower reads them, and the ids of their captions."""
    from mmjax.data.pipeline import captions_of, evaluation_images
    from mmjax.data.sources import open_source

    source, encoder = open_source("openmoji:en", split), model.config.model.encoders.image
    captions = [captions_of(source[index])[0] for index in range(len(source))]
    images, _ = evaluation_images(source, encoder.image_size, encoder.resize, np.arange(len(source)))
    return {"image": images, "text": model.token_ids(captions)}


def encode(model, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The embeddings of each modality, and the seconds that they took."""
    embeddings, seconds = {}, {}
    for modality, rows in inputs.items():
        start = time.perf_counter()
        embeddings[modality] = model.encode_rows(modality, len(rows), rows.__getitem__)
        seconds[modality] = time.perf_counter() - start
    return embeddings, seconds


def fastest(models: dict, inputs: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The seconds of each model and modality; the models take turns, so that all see the same machine."""
    rounds = [{name: encode(model, inputs)[1] for name, model in models.items()} for _ in range(ROUNDS)]
    return {name: {modality: min(each[name][modality] for each in rounds) for modality in inputs} for name in models}


def compare(embeddings: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    """How near embeddings are to the exact ones, and how often they find the same first."""
    found = {}
    for modality in embeddings:
        both = (each[modality].astype(np.float64) for each in (embeddings, exact))
        own, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in both)
        distances = ((own - other) ** 2).sum(axis=1) / 2
        found[f"{modality}_cosine_distance_mean"] = float(distances.mean())
        found[f"{modality}_cosine_distance_max"] = float(distances.max())
    first, exact_first = (each["text"] @ each["image"].T for each in (embeddings, exact))
    for axis, direction in ((1, "text_to_image"), (0, "image_to_text")):
        same = first.argmax(axis=axis) == exact_first.argmax(axis=axis)
        found[f"{direction}_same_first"] = float(same.mean())
    return found


if __name__ == "__main__":
    main()
