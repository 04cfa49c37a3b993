"""A small model that is trained with every objective, and a batch for it."""

import jax
import numpy as np

from mmjax import api
from mmjax import config as configs
from mmjax.models.outputs import Vocabulary
from mmjax.training.gradient import make_gradient
from mmjax.training.teacher import Teacher
from tests import tiny

ROWS, LENGTH, VOCAB = 16, 8, 40


def config_of(**decoder):
    """Towers, fusion and decoder of one layer; the run's own average is the teacher."""
    config = tiny.get_config()
    image, text = config.model.encoders.image, config.model.encoders.text
    image.update(depth=1, heads=2, token_drop=0.5)
    text.update(depth=1, heads=2, vocab_size=VOCAB, causal=True)
    config.model.fusion = configs.fusion(depth=1)
    config.model.decoder = configs.decoder(depth=1, **decoder)
    config.objectives.captioning = configs.objective(
        kind="captioning", weight=2.0, parallel=0.5 * (decoder == {}), label_smoothing=0.1
    )
    config.objectives.matching = configs.objective(kind="matching", weight=0.5)
    config.objectives.masked = configs.objective(kind="masked", weight=1.5, probability=0.4, teacher_weight=0.3)
    config.objectives.distilled = configs.objective(kind="similarity_distillation", weight=0.7)
    config.teacher.source, config.train.ema_decay = "ema", 0.9
    return config


def vocabulary():
    """Every token is a word; the last two ids and padding are special."""
    special = np.isin(np.arange(VOCAB), (0, VOCAB - 2, VOCAB - 1))
    return Vocabulary(VOCAB - 1, np.ones(VOCAB, bool), np.ones(VOCAB, bool), special)


def batch(rows=ROWS, missing=0.25):
    """Images and texts of several lengths; so many rows have no text."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, VOCAB - 2, (rows, LENGTH), np.int32)
    text[np.arange(LENGTH) >= rng.integers(2, LENGTH + 1, (rows, 1))] = 0
    image = rng.integers(0, 256, (rows, 28, 28, 3), np.uint8)
    found = {"image": image, "text": text, "rng": jax.random.split(jax.random.key(7), rows)}
    if missing:
        found["has_text"] = np.arange(rows) >= missing * rows
        text[~found["has_text"]] = 0
    return found


def parameters(config, seed=0):
    """Random ones of one size, so that everything in the model matters."""
    shapes = jax.eval_shape(lambda: api.init_params(config, api.make_module(config)))
    rng = np.random.default_rng(seed)
    draw = {"logit_scale": lambda shape: np.float32(2), "logit_bias": lambda shape: np.float32(-2)}
    return {
        name: draw[name](()) if name in draw else jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype("f"), part)
        for name, part in shapes.items()
    }


def gradient_function(config, names):
    """`(gradient, metrics)` of (parameters, teacher's parameters, batch), to be compiled."""
    module, words = api.make_module(config), vocabulary()
    teacher, gradient = Teacher(module, {}, 28, words), make_gradient(config, module, words)

    def run(params, teacher_params, batch):
        return gradient(params, batch, jax.random.key(1), names, teacher.of(teacher_params))

    return run


def norm(tree):
    """Of a tree of arrays."""
    return float(np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree))))


def assert_equal(found, expected, tolerance=1e-5):
    """Gradients up to a part of their size, metrics up to the same part."""
    (grads, metrics), (expected_grads, expected_metrics) = found, expected
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=tolerance, atol=tolerance / 10, err_msg=name)
    difference = jax.tree.map(lambda a, b: np.linalg.norm(np.float64(a) - b), grads, expected_grads)
    assert max(jax.tree.leaves(difference)) < tolerance * norm(expected_grads), difference
