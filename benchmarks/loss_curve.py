"""The same small CLIP, trained by mmjax and by open_clip: do the loss curves agree?

    python benchmarks/loss_curve.py
    python benchmarks/loss_curve.py --json=loss_curve.json --picture=loss_curve.png
    python benchmarks/loss_curve.py --goldens=tests/training/goldens_loss_curve.json

Both begin with the weights that mmjax draws, see the same batches of OpenMoji in the same order, and have the same
hyperparameters: float32, AdamW with decay of the same matrices, warm-up and cosine, gradients clipped to a norm of 1.
mmjax takes its real training step; open_clip's side is its model, its loss and PyTorch's optimizer
(`open_clip_twin.py`). Everything runs on the CPU, once with the softmax loss and once with the sigmoid loss.

    max_difference          the largest difference of the two losses of a step, over all steps
    first_step_difference   that of the first step, before anything is learned
    gradient_difference     of the first step, relative to the largest value of the same parameter's gradient; the
                            largest of all parameters
    learned                 by how much mmjax's loss falls, from the first ten steps to the last ten

`--goldens` writes what the tests compare mmjax with where there is no PyTorch. The peer needs what
benchmarks/quickstart.py needs. Exit codes: 1, a difference is too large; 2, a package of the peer is not installed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import report
from jaxtyping import PyTree
from ml_collections import ConfigDict
from open_clip_twin import Arrays, open_clip_gradient, open_clip_losses, to_open_clip
from quickstart import NEEDED

from mmjax import api
from mmjax import config as configs
from mmjax.data import pipeline
from mmjax.sharding.rules import batch_sharding
from mmjax.training import setup
from mmjax.training.gradient import make_gradient
from mmjax.validation import validate

OBJECTIVES = ("softmax", "sigmoid")
STEPS, GOLDEN_STEPS, BATCH_SIZE = 100, 20, 64
Batch = Mapping[str, np.ndarray]
Curves = dict[str, list[float]]
MAX_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 1e-3, 1e-4


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    needed = [*NEEDED["open_clip"], *(["matplotlib"] if arguments.picture else [])]
    if not report.installed(needed, "see benchmarks/quickstart.py"):
        return 2
    jax.config.update("jax_platforms", "cpu")  # other devices round in other ways
    curves, metrics, goldens = {}, {}, {}
    for objective in OBJECTIVES:
        with opened(objective) as run:
            data = batches(run, max(arguments.steps, GOLDEN_STEPS))
            curves[objective], found = compare(run, data[: arguments.steps])
            metrics |= {f"{objective}/{name}": value for name, value in found.items()}
            if arguments.goldens:
                goldens[objective] = golden(run, data[:GOLDEN_STEPS])
    report.print_table(metrics, f"{arguments.steps} steps of {BATCH_SIZE} pairs")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    if arguments.picture:
        from loss_curve_picture import draw

        draw(curves, MAX_DIFFERENCE, arguments.picture)
    if arguments.goldens:
        arguments.goldens.write_text(json.dumps(goldens, indent=1) + "\n")
    limits = {"max_difference": MAX_DIFFERENCE, "gradient_difference": MAX_GRADIENT_DIFFERENCE}
    agree = [metrics[f"{name}/{what}"] <= limit for name in OBJECTIVES for what, limit in limits.items()]
    return 0 if all(agree) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="take only so many of the steps")
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG file")
    parser.add_argument("--goldens", type=Path, help="write the peer's first losses and gradients to this file")
    arguments = parser.parse_args()
    if not 1 <= arguments.steps <= STEPS:
        parser.error(f"--steps must be between 1 and {STEPS}")
    return arguments


def recipe(objective: str) -> ConfigDict:
    """Two small towers that differ in every size, so that nothing fits where it does not belong."""
    config = configs.default()
    config.model.embed_dim = 32
    config.model.logit_scale = 10.0 if objective == "sigmoid" else 1 / 0.07
    config.model.encoders.image = configs.image_encoder(
        variant="Ti/8", image_size=32, pooling="cls", width=64, depth=2, heads=4, mlp_dim=256
    )
    config.model.encoders.text = configs.text_encoder(
        variant="Ti", length=12, vocab_size=4096, pooling="last", causal=True, width=48, depth=3, heads=3, mlp_dim=96
    )
    config.objectives.contrastive = configs.objective(kind=objective)
    config.streams.train = configs.stream(source="openmoji:en", batch_size=BATCH_SIZE)
    config.optimizer.update(learning_rate=1e-3, warmup=10.0, b2=0.98, weight_decay=0.2)
    config.optimizer.rules = (("patch_embed/bias$", None, 1.0),)  # open_clip has none: it stays 0
    config.precision.compute = "float32"
    config.train.steps = STEPS
    return config


@contextmanager
def opened(objective: str) -> Iterator[setup.Setup]:
    """Yields the recipe's run, ready to train, in a folder that is gone afterwards."""
    config = recipe(objective)
    validate(config, jax.device_count())
    with tempfile.TemporaryDirectory() as folder:
        run = setup.prepare(config, Path(folder) / "run")
        with jax.set_mesh(run.mesh):
            yield run


def batches(run: setup.Setup, steps: int) -> list[Batch]:
    """The first batches of the run: `image` uint8 [64, 32, 32, 3], `text` int32 [64, 12]."""
    stream = pipeline.train_batches(run.config, run.sources, run.tokenizer, run.rows, 0, run.steps)
    found = [next(stream)[1] for _ in range(steps)]
    stream.close()
    return found


def compare(run: setup.Setup, data: Sequence[Batch]) -> tuple[Curves, dict[str, float]]:
    """The losses of both, and the metrics."""
    params = jax.device_get(run.make_state().params)
    weights = to_open_clip(params)
    loss, gradient = mmjax_gradient(run, params, data[0])
    peer_loss, peer_gradient = open_clip_gradient(run.config, weights, data[0])
    curves = {"mmjax": mmjax_losses(run, data), "open_clip": open_clip_losses(run.config, weights, data, run.steps)}
    ours = np.array(curves["mmjax"])
    metrics = {f"{name}_last_loss": losses[-1] for name, losses in curves.items()} | {
        "learned": ours[:10].mean() - ours[-10:].mean(),
        "max_difference": np.abs(ours - curves["open_clip"]).max(),
        "first_step_difference": abs(loss - peer_loss),
        "gradient_difference": max(gradient_differences(gradient, peer_gradient).values()),
    }
    return curves, {name: float(value) for name, value in metrics.items()}


def mmjax_gradient(run: setup.Setup, params: PyTree, batch: Batch) -> tuple[float, Arrays]:
    """The loss of one batch, and its gradient under open_clip's names."""
    gradient = jax.jit(make_gradient(run.config, api.make_module(run.config)), static_argnums=3)
    rng = jax.random.key(0)  # as every step has it; nothing here is random
    rows = {**batch, "rng": jax.random.split(rng, BATCH_SIZE)}
    grads, metrics = gradient(params, rows, rng, ("contrastive",))
    return float(metrics["train/loss"]), to_open_clip(grads)


def mmjax_losses(run: setup.Setup, data: Sequence[Batch]) -> list[float]:
    """The loss of each batch in training, from the run's first state on."""
    state, losses, sharding = run.make_state(), [], batch_sharding(run.mesh)
    for batch in data:
        state, metrics = run.train_step(state, jax.device_put(batch, sharding), ("contrastive",))
        losses.append(float(metrics["train/loss"]))
    return losses


def gradient_differences(ours: Arrays, peer: Arrays) -> dict[str, float]:
    """The largest difference in each parameter of the peer, relative to its largest value there."""
    return {name: np.abs(ours[name] - value).max() / np.abs(value).max() for name, value in peer.items()}


def golden(run: setup.Setup, data: Sequence[Batch]) -> dict:
    """What there is to know of the peer: its losses, and the norms of its first weights and gradients.

    The means of pixels and ids tell other batches from other losses.
    """
    weights = to_open_clip(jax.device_get(run.make_state().params))
    _, gradient = open_clip_gradient(run.config, weights, data[0])
    return {
        "losses": open_clip_losses(run.config, weights, data, run.steps),
        "weight_norms": norms(weights),
        "gradient_norms": norms(gradient),
        "batch_means": [means(batch) for batch in data],
    }


def norms(arrays: Arrays) -> dict[str, float]:
    """The Euclidean norm of each array."""
    return {name: float(np.linalg.norm(value)) for name, value in arrays.items()}


def means(batch: Batch) -> list[float]:
    """Of its pixels, and of its token ids."""
    return [float(batch[name].mean()) for name in ("image", "text")]


if __name__ == "__main__":
    sys.exit(main())
