"""Training beside open_clip's, from the same weights on the same batches: against open_clip where it is installed, and
against what it computed before (`goldens_loss_curve.json`).

The goldens have to be made again when the recipe in benchmarks/loss_curve.py changes, or the initial weights, or the
batches: OpenMoji, its tokenizer, how images are resized and cropped. Where only those differ, the test of weights and
batches fails too:

    python benchmarks/loss_curve.py --goldens=tests/training/goldens_loss_curve.json
"""

import importlib
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.programs import ROOT

GOLDENS = json.loads(Path(__file__).with_name("goldens_loss_curve.json").read_text())
# A tenth of what is promised: an exact GELU, or another epsilon in normalisations or AdamW, makes about 2e-4.
LOSS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def program():
    """benchmarks/loss_curve.py; programs there import each other as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("loss_curve")


@pytest.fixture(scope="module", params=sorted(GOLDENS))
def trained(request, program, openmoji_folder):
    """A run, its first weights, its batches, the first gradient and the losses."""
    with program.opened(request.param) as run:
        data = program.batches(run, program.GOLDEN_STEPS)
        params = run.make_state().params
        _, gradient = program.mmjax_gradient(run, params, data[0])
        weights = program.to_open_clip(jax.device_get(params))
        yield request.param, run, weights, data, gradient, program.mmjax_losses(run, data)


def test_weights_and_batches_are_those_of_the_goldens(program, trained):
    objective, _, weights, data, *_ = trained
    expected = GOLDENS[objective]
    assert program.norms(weights) == pytest.approx(expected["weight_norms"], rel=1e-5, abs=1e-6)
    np.testing.assert_allclose([program.means(batch) for batch in data], expected["batch_means"], rtol=1e-4)


def test_the_first_gradient_is_that_of_the_goldens(program, trained):
    objective, *_, gradient, _ = trained
    norms = program.norms(gradient)
    for name, expected in GOLDENS[objective]["gradient_norms"].items():
        assert norms[name] == pytest.approx(expected, rel=1e-4), name


def test_losses_are_those_of_the_goldens(program, trained):
    objective, *_, losses = trained
    assert len(losses) == program.GOLDEN_STEPS == 20
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(losses, GOLDENS[objective]["losses"], rtol=0, atol=LOSS_TOLERANCE)


def test_gradient_and_losses_are_those_of_open_clip(program, trained):
    missing = [name for name in program.NEEDED["open_clip"] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    _, run, weights, data, gradient, losses = trained
    _, expected = program.open_clip_gradient(run.config, weights, data[0])
    for name, difference in program.gradient_differences(gradient, expected).items():
        assert difference < program.MAX_GRADIENT_DIFFERENCE, name
    peer = program.open_clip_losses(run.config, weights, data, run.steps)
    np.testing.assert_allclose(losses, peer, rtol=0, atol=LOSS_TOLERANCE)
