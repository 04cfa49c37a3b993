from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.models import flops
from mmjax.models.multimodal import ImageEncoder
from mmjax.models.token_drop import drop_tokens, kept_tokens
from tests.models.test_models import encode


@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(1, 1000), percent=st.integers(0, 99))
def test_the_number_dropped_is_the_fraction_rounded_down(tokens, percent):
    assert kept_tokens(tokens, percent / 100) == tokens - tokens * percent // 100 >= 1


def test_a_row_keeps_some_of_its_own_tokens_in_order_and_its_first():
    x = jnp.arange(4 * 11.0).reshape(4, 11, 1)
    kept = drop_tokens(x, jax.random.split(jax.random.key(0), 4), 0.5, always_kept=1)
    assert kept.shape == (4, 6, 1)
    np.testing.assert_array_equal(kept[:, 0], x[:, 0])
    assert (np.diff(kept[..., 0], axis=1) > 0).all()
    assert (kept // 11 == jnp.arange(4)[:, None, None]).all()
    assert len(np.unique(kept[..., 0] % 11, axis=0)) > 1  # rows drop different ones


def test_what_a_row_keeps_depends_on_its_key_alone():
    x, keys = jnp.arange(20.0)[None, :, None].repeat(8, axis=0), jax.random.split(jax.random.key(1), 8)
    kept = drop_tokens(x, keys, 0.7)
    np.testing.assert_array_equal(drop_tokens(x[2::3], keys[2::3], 0.7), kept[2::3])


def test_every_token_is_as_likely_to_stay():
    x = jnp.arange(10.0)[None, :, None].repeat(4000, axis=0)
    kept = drop_tokens(x, jax.random.split(jax.random.key(2), 4000), 0.4)
    share = np.bincount(np.int32(kept).ravel(), minlength=10) / 4000
    np.testing.assert_allclose(share, 0.6, atol=0.04)  # five standard deviations


@pytest.mark.parametrize("pooling, tokens", [("map", 8), ("cls", 9), ("mean", 8)])
def test_only_training_drops(mesh, pooling, tokens):
    config = configs.image_encoder(
        variant="Ti/14", width=32, heads=8, mlp_dim=64, depth=1, image_size=56, pooling=pooling, token_drop=0.5
    )
    tower, key = ImageEncoder(FrozenDict(config.to_dict())), jax.random.key(0)
    image = jax.random.randint(key, (3, 56, 56, 3), 0, 256).astype(jnp.uint8)
    params = jax.jit(partial(tower.init, method=encode))(key, image)
    apply = jax.jit(partial(tower.apply, method=encode))
    trained, whole = apply(params, image, jax.random.split(key, 3)), apply(params, image)
    assert trained["tokens"].shape == (3, tokens, 32)
    assert whole["tokens"].shape == (3, 16 + (pooling == "cls"), 32)
    assert np.abs(trained["pooled"] - whole["pooled"]).max() > 1e-3


def test_training_counts_the_operations_of_kept_tokens(mesh):
    encoder = configs.image_encoder(variant="Ti/16", depth=2, image_size=128, unroll=0, token_drop=0.5)
    tower, rng = ImageEncoder(FrozenDict(encoder.to_dict())), jax.random.split(jax.random.key(0), 4)
    image = jnp.zeros((4, 128, 128, 3), jnp.uint8)
    params = jax.eval_shape(partial(tower.init, method=encode), jax.random.key(0), image)
    apply = jax.jit(partial(tower.apply, method=encode))
    counted = apply.lower(params, image, rng).compile().cost_analysis()["flops"] / 4
    assert flops.train_flops({"encoders": {"image": encoder}}, ("image",)) == pytest.approx(3 * counted, rel=0.1)
    assert flops.tower_flops(encoder) > 1.7 * counted
