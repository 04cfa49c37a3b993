"""The audio tower: its tokens, its positions, what it may be given; and a decoder that reads it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax.sharding import PartitionSpec as P

from mmjax import config as configs
from mmjax.models import flops
from mmjax.models.audio import AudioEmbed, sinusoids
from mmjax.models.multimodal import AudioEncoder, MultimodalModel, Text, audio_samples, audio_tokens
from mmjax.sharding import rules

KEY = jax.random.key(0)
SIZE = {"width": 16, "depth": 2, "heads": 4, "mlp_dim": 24}
SMALL = configs.audio_encoder(**SIZE, sample_rate=1600, seconds=2, fft=40, hop=16, mels=8)


def samples(rows=2, config=SMALL, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(0, 0.1, (rows, audio_samples(config))))


def tower(**fields):
    return AudioEncoder(FrozenDict(SMALL.to_dict() | fields))


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [({}, 1500), ({"seconds": 1}, 50), ({"hop": 320}, 750), ({"sample_rate": 8_000, "seconds": 1, "hop": 170}, 24)],
)
def test_a_token_is_two_frames(mesh, fields, tokens):
    config = configs.audio_encoder(**SIZE | fields)
    assert audio_tokens(config) == tokens
    encoder = AudioEncoder(FrozenDict(config.to_dict()))
    found, _ = jax.eval_shape(encoder.init_with_output, KEY, samples(1, config))
    assert found[0].shape == (1, tokens, SIZE["width"]) and found[1] is None


@pytest.mark.parametrize("pooling", ["last", "cls"])
def test_where_one_token_is_pooled_the_last_layer_computes_no_other(mesh, pooling):
    config = configs.default()
    config.model.encoders, config.model.parts = {"audio": tower(pooling=pooling).config}, ("audio",)
    module = MultimodalModel(FrozenDict(config.model.to_dict()), parts=("audio",))
    variables = module.init(KEY, "audio", samples(), method="encode")
    found = module.apply(variables, "audio", samples(), method="features")
    expected = module.apply(variables, "audio", samples(), method="encode")
    np.testing.assert_allclose(found["embedding"], expected["embedding"], atol=1e-5)
    assert module.apply(variables, "audio", samples(), method="tokens", pooled_only=True)[0].shape == (2, 1, 16)


def test_the_parameters_are_those_of_whisper(mesh):
    """Whisper tiny: 7,632,384 parameters in transformers' encoder without its fixed positions; keys have no bias."""
    config = configs.audio_encoder(width=384, depth=4, heads=6, mlp_dim=1536, key_bias=False)
    encoder = AudioEncoder(FrozenDict(config.to_dict()))
    params = jax.eval_shape(encoder.init, KEY, samples(1, config))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) - 1500 * 384
    assert count == 7_632_384


def test_positions_are_sines_and_then_cosines():
    table = sinusoids(50, 8)
    np.testing.assert_allclose(table[0], [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(50)), atol=1e-6)
    np.testing.assert_allclose(table[:, 7], np.cos(np.arange(50) / 10_000), atol=1e-6)
    assert sinusoids(3, 2).shape == (3, 2)


def embed(tokens=100):
    return AudioEmbed(1600, 40, 16, 8, tokens, 16)


def test_positions_start_as_sinusoids_and_are_added(mesh):
    module, x = embed(), samples()
    params = module.init(KEY, x)["params"]
    np.testing.assert_array_equal(params["position"], sinusoids(100, 16))
    shifted = params | {"position": params["position"] + 1}
    np.testing.assert_allclose(
        module.apply({"params": shifted}, x), module.apply({"params": params}, x) + 1, rtol=0, atol=1e-5
    )


def test_convolutions_reach_three_frames_and_skip_every_second(mesh):
    """A sound changes the tokens around it alone: what the spectrogram's loudest value decides is kept the same."""
    module, x = embed(), samples()
    params = module.init(KEY, x)
    loud = x.at[:, 1000].add(0.01)
    changed = np.abs(module.apply(params, loud) - module.apply(params, x)).max(axis=(0, 2)) > 1e-5
    places = np.flatnonzero(changed)
    assert len(places) and places.min() >= 1000 // 32 - 3 and places.max() <= 1000 // 32 + 3


def test_less_sound_makes_fewer_tokens_and_more_than_there_are_positions_is_refused(mesh):
    module, x = embed(), samples()
    params = module.init(KEY, x)
    assert module.apply(params, x[:, :1600]).shape == (2, 50, 16)
    with pytest.raises(ValueError, match="3216 samples make 101 tokens, and there are 100 positions"):
        module.apply(params, jnp.pad(x, ((0, 0), (0, 16))))


def test_tokens_are_dropped_in_training_alone(mesh):
    encoder, x = tower(token_drop=0.5), samples()
    params = encoder.init(KEY, x)
    assert encoder.apply(params, x)[0].shape == (2, 100, 16)
    assert encoder.apply(params, x, jax.random.split(KEY, 2))[0].shape == (2, 50, 16)


def test_sixteen_bits_are_close(mesh):
    encoder, x = tower(), samples()
    params = encoder.init(KEY, x)
    exact, _ = encoder.apply(params, x)
    rough, _ = encoder.clone(dtype=jnp.bfloat16).apply(params, x)
    assert rough.dtype == jnp.bfloat16
    assert np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


def speech_model(**decoder):
    model = configs.default().model
    model.encoders = {"audio": SMALL, "text": configs.text_encoder(**SIZE, vocab_size=12, length=6, key_bias=False)}
    model.decoder = configs.decoder(depth=2, modality="audio", **decoder)
    return MultimodalModel(FrozenDict(model.to_dict()), parts=("audio", "decoder"))


def test_a_decoder_reads_recordings(mesh):
    module, ids = speech_model(), jnp.int32([[1, 2, 3, 4, 5, 6]] * 2)
    params = module.init(KEY, {"audio": samples(), "text": ids})

    def logits(audio):
        tokens, _ = module.apply(params, "audio", audio, method="tokens")
        return module.apply(params, Text(ids, None, None), tokens, method="caption")

    first, second = logits(samples()), logits(samples(seed=1))
    assert first.shape == (2, 6, 12) and np.abs(first - second).max() > 1e-4


def test_a_head_without_a_bias_has_no_such_parameter(mesh):
    batch = {"audio": samples(), "text": jnp.ones((2, 6), jnp.int32)}
    heads = [
        jax.eval_shape(speech_model(tied=True, head_bias=bias).init, KEY, batch)["params"]["decoder"].get("token_head")
        for bias in (True, False)
    ]
    assert set(heads[0]) == {"vocab_bias"} and not heads[1]


def test_every_parameter_has_its_place_on_the_mesh(mesh):
    batch = {"audio": samples(), "text": jnp.ones((2, 6), jnp.int32)}
    params = jax.eval_shape(partial(speech_model().init, KEY), batch)["params"]
    specs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = rules.logical_axes(rules.path_name(path))
        assert len(axes) == leaf.ndim
        specs[rules.path_name(path)] = rules.RULES.parameter_spec(axes)
    assert specs["audio/embed/conv2/kernel"] == P(None, None, "fsdp")
    assert specs["audio/embed/position"] == P(None, "fsdp")


def test_flops_grow_with_the_recording_and_fall_with_dropped_tokens():
    one, two = (flops.tower_flops(configs.audio_encoder(seconds=seconds)) for seconds in (15, 30))
    assert 2 < two / one < 2.5
    dropping = configs.audio_encoder(token_drop=0.5)
    assert flops.tower_flops(dropping, training=True) < 0.6 * flops.tower_flops(dropping)
    model = speech_model().config
    assert flops.part_flops(model, "decoder") > 0
