"""Objectives against what transformers (BLIP, BERT) and open_clip (CoCa) computed before, on the same weights.

`make_goldens_objectives.py` made the goldens; `test_peers_objectives.py` asks the peers again where they are installed.
"""

import json

import numpy as np
import pytest

from tests.objectives.make_goldens_objectives import PATH, brief
from tests.objectives.peer_cases import CASES, value_and_gradient

GOLDENS = json.loads(PATH.read_text())["cases"]
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_goldens(name, mesh):
    loss, gradient = value_and_gradient(CASES[name]())
    assert loss == pytest.approx(GOLDENS[name]["loss"], rel=TOLERANCE)
    found, expected = brief(gradient), GOLDENS[name]["gradient"]
    assert found.keys() == expected.keys()
    # Attention ignores what all keys have in common: the gradient of their bias is 0 but for rounding.
    rounding = 1e-6 * np.sqrt(sum(numbers[0] ** 2 for numbers in expected.values()))
    for path, numbers in expected.items():
        np.testing.assert_allclose(
            found[path], numbers, rtol=0, atol=TOLERANCE * numbers[0] + 3 * rounding, err_msg=path
        )
