"""The decoder token by token, with its cache, against all tokens at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import captioners

# Between them, every two settings meet.
VARIANTS = [
    {},
    {"start": False},
    {"image": "prefix", "tied": True},
    {"image": "prefix", "start": False, "image_queries": 4, "transform": True},
    {"image_queries": 4, "tied": True, "norm": "post"},
    {"tied": True, "transform": True, "start": False, "norm": "post", "image": "prefix"},
    {"reads": "text"},
    {"reads": "text", "start": False, "image_queries": 4, "norm": "post"},
    {"reads": "text", "image": "prefix", "transform": True},
    {"reads": "text", "start": False, "cross_mlp": True, "image_class_token": False, "head_bias": False},
    {"cross_mlp": True, "image_queries": 4, "query_norm": "input", "query_heads": 1},
    {"reads": "text", "image": "prefix", "start": False, "image_queries": 4, "transform": True, "norm": "post"},
]


@partial(jax.jit, static_argnums=0)
def cached_logits(module, params, image, ids):
    """As `captioners.logits`, one token after the other."""
    known = {"params": params}
    first, cache = module.apply(known, image, ids[:, 0], method="begin_caption")
    start = module.config["decoder"]["start"]

    def step(cache, slot):
        token = ids[:, slot - 1 if start else slot]
        found, cache = module.apply(known, token, slot, cache, method="continue_caption")
        return cache, found

    _, rest = jax.lax.scan(step, cache, jnp.arange(1, ids.shape[1] - (0 if start else 1)))
    return jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)


def texts(rows=5, length=6):
    """Ids of texts of every length, padded."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 7, (rows, length), np.int32)
    ends = np.arange(rows) + 1
    ids[np.arange(rows), ends] = captioners.END
    ids[np.arange(length) > ends[:, None]] = captioners.PAD
    return ids


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(f"{k}={v}" for k, v in variant.items()))
def test_logits_are_the_same_at_every_place_with_and_without_the_cache(mesh, variant):
    module, ids = captioners.module(**variant), texts()
    params, image = captioners.parameters(module), captioners.image_tokens(len(ids))
    expected = np.asarray(captioners.logits(module, params, image, ids))
    found = np.asarray(cached_logits(module, params, image, ids))
    assert found.shape == expected.shape == (5, 6 if variant.get("start", True) else 5, 7)
    predicted = ids[:, ids.shape[1] - expected.shape[1] :] != captioners.PAD
    assert np.abs(found - expected)[predicted].max() < 1e-5
    assert expected.std(axis=(0, 1)).mean() > 0.2


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[3:4] + VARIANTS[7:9])
def test_a_place_sees_the_image_and_what_is_before_it_alone(mesh, variant):
    module, ids = captioners.module(**variant), np.full((1, 6), 3, np.int32)
    params, image = captioners.parameters(module), captioners.image_tokens(1)
    expected = captioners.logits(module, params, image, ids)
    for place in range(6):
        changed = ids.copy()
        changed[0, place] = 5
        different = np.abs(captioners.logits(module, params, image, changed) - expected).max(axis=(0, 2)) > 1e-4
        after = np.arange(6)[6 - len(different) :] > place
        np.testing.assert_array_equal(different, after)
    other = captioners.logits(module, params, image + 1, ids)
    assert (np.abs(other - expected).max(axis=(0, 2)) > 1e-4).all()
