"""What smaller weights cost and save: bfloat16 and eight-bit integers beside float32.

    python -m mmjax.main --config=configs/quickstart.py
    python benchmarks/weights.py --json=weights.json
    python benchmarks/weights.py --model=FOLDER --split=test --json=weights_minilm.json

Loads a model with each type of weights (`mmjax.load(MODEL, weights=TYPE)`), and of each tells

    TYPE/parameter_bytes             on the device
    TYPE/text_to_image_R@1           of the 400 held-out emoji; and image_to_text_R@1
    TYPE/image_cosine_distance_mean  1 - the cosine of an embedding and the float32 model's of the same image, mean and
    TYPE/image_cosine_distance_max   largest over all 3,944 emoji (or those of --split); and of their English names,
                                     text_cosine_distance_mean, ..._max
    TYPE/text_to_image_same_first    the share of all captions that find the same image first, among all, as with
                                     float32; and image_to_text_same_first
    TYPE/image_seconds               encoding these images, decoded, the fastest of 5 rounds; and text_seconds

What the model computes in stays the same, on a CPU float32. Of a model for texts alone there are no recalls, and

    TYPE/text_to_text_same_first     is the share of names that find the same other one first as with float32.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmjax import runtime
from mmjax.errors import UserError

ROUNDS = 5


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart", help="what `mmjax.load` takes: a run, a folder, a name")
    parser.add_argument("--split", default="all", help="of the emoji, for cosines and times: all, test or train")
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    import report  # beside this file, where a program finds it but a test does not

    runtime.configure()
    try:
        metrics = measure(arguments.model, arguments.split)
    except UserError as error:
        parser.error(str(error))
    report.print_table(metrics, f"Smaller weights of {arguments.model}")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def measure(source: str, split: str) -> dict[str, float]:
    """All metrics; cosines and times are of this split of the emoji."""
    import jax

    from mmjax import api, quantization
    from mmjax import config as configs
    from mmjax.evaluators import Evaluation

    models = {weights: api.load(source, weights=weights) for weights in quantization.WEIGHTS}
    inputs = make_inputs(models["float32"], split)
    embeddings = {weights: encode(model, inputs)[0] for weights, model in models.items()}
    seconds, found = fastest(models, inputs), {}
    evaluation = Evaluation({"test": configs.retrieval(source="openmoji:en", match="record")})
    for weights, model in models.items():
        own = {"parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))}
        if len(inputs) > 1:
            recalls = evaluation.run(["test"], model, Path(tempfile.gettempdir()))
            own |= {name: recalls[f"eval/test/{name}"] for name in ("text_to_image_R@1", "image_to_text_R@1")}
        own |= compare(embeddings[weights], embeddings["float32"])
        own |= {f"{modality}_seconds": round(value, 3) for modality, value in seconds[weights].items()}
        found |= {f"{weights}/{name}": value for name, value in own.items()}
    return found


def make_inputs(model, split: str) -> dict[str, Any]:
    """All captions, and where there is a tower for them the images as it reads them."""
    from mmjax.data.image_reader import Reader
    from mmjax.data.pipeline import captions_of, decode_image
    from mmjax.data.sources import open_source

    source, encoders = open_source("openmoji:en", split), model.config.model.encoders
    records = [source[index] for index in range(len(source))]
    inputs: dict[str, Any] = {"text": [captions_of(record)[0] for record in records]}
    if "image" in encoders:
        inputs["image"] = Reader.of(encoders.image)(decode_image(record) for record in records)
    return inputs


def encode(model, inputs: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The embeddings of each modality, and the seconds that they took."""
    embeddings, seconds = {}, {}
    for modality, rows in inputs.items():
        start = time.perf_counter()
        if modality == "text":
            embeddings[modality] = model.encode_text(rows)
        else:
            embeddings[modality] = model.encode_rows(modality, len(rows), rows.__getitem__)
        seconds[modality] = time.perf_counter() - start
    return embeddings, seconds


def fastest(models: dict, inputs: dict[str, Any]) -> dict[str, dict[str, float]]:
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
    pairs = (("text", "image"), ("image", "text")) if "image" in embeddings else (("text", "text"),)
    for query, answer in pairs:
        same = first(embeddings, query, answer) == first(exact, query, answer)
        found[f"{query}_to_{answer}_same_first"] = float(same.mean())
    return found


def first(embeddings: dict[str, np.ndarray], query: str, answer: str) -> np.ndarray:
    """Which row of `answer` is the most similar to each of `query`; not itself."""
    cosines = embeddings[query] @ embeddings[answer].T
    if query == answer:
        np.fill_diagonal(cosines, -np.inf)
    return cosines.argmax(axis=1)


if __name__ == "__main__":
    main()
