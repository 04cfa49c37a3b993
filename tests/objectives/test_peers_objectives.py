"""Live parity of objectives with transformers (BLIP, BERT) and open_clip (CoCa), where they are installed."""

import importlib.util

import numpy as np
import pytest

from tests.objectives import peers
from tests.objectives.peer_cases import CASES, value_and_gradient

MISSING = [name for name in peers.NEEDED if importlib.util.find_spec(name) is None]
TOLERANCE = 1e-4


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_peers(name, mesh):
    case = CASES[name]()
    loss, gradient = value_and_gradient(case)
    expected, peer = peers.VALUE_AND_GRADIENT[name](case)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    assert gradient.keys() == peer.keys() == case.weights.keys()
    # Attention ignores what all keys have in common: the gradient of their bias is 0 but for rounding.
    rounding = 1e-6 * np.sqrt(sum(np.linalg.norm(value) ** 2 for value in peer.values()))
    for path, value in gradient.items():
        distance = np.linalg.norm(value - peer[path])
        assert distance <= TOLERANCE * np.linalg.norm(peer[path]) + rounding, path
