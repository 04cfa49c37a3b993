"""Recordings in the space that they share with texts."""

from functools import partial

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.data import text
from mmjax.errors import UserError
from mmjax.sharding.mesh import make_mesh
from tests.data.test_audio import encoded
from tests.interop import whispers

RATE = 1_600


def towers():
    """Random towers of recordings of a second, and of texts."""
    size = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 32}
    config = configs.default()
    config.model.embed_dim, config.model.parts = 8, ("audio", "text")
    config.model.encoders.audio = configs.audio_encoder(**size, sample_rate=RATE, seconds=1, fft=40, hop=16, mels=8)
    config.model.encoders.text = configs.text_encoder(**size, vocab_size=264, length=8)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.jit(partial(api.init_params, config, api.make_module(config)))()
    return api.Model(config, params, text.HuggingFaceTokenizer(whispers.tokenizer()), mesh)


@pytest.fixture(scope="module")
def model():
    return towers()


def recording(number, seconds=0.8):
    return np.random.default_rng(number).normal(0, 0.1, int(RATE * seconds)).astype(np.float32)


def test_recordings_and_texts_have_unit_norm_in_one_space(model):
    audios, texts = model.encode_audio([recording(0), recording(1)]), model.encode_text(["a dog barks"])
    assert audios.shape == (2, 8) and texts.shape == (1, 8) and audios.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(audios, axis=1), 1, atol=1e-5)
    assert np.abs(audios[0] - audios[1]).max() > 1e-3
    assert model.similarity(audios, texts).shape == (2, 1)


def test_files_arrays_and_other_rates_are_the_same(model, tmp_path):
    path = tmp_path / "noise.wav"
    path.write_bytes(encoded(recording(0), RATE, subtype="FLOAT"))
    found = model.encode_audio([path, str(path), recording(0), (recording(0), RATE)])
    np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-5)


def test_what_is_too_long_is_cut_off_and_silence_fills_up(model):
    long, short = recording(0, 3), recording(1, 0.5)
    found = model.encode_audio([long, long[:RATE], short, np.pad(short, (0, RATE // 2))])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(found[2], found[3], atol=1e-5)


def test_what_the_model_lacks_is_said(model):
    with pytest.raises(UserError, match="this model cannot transcribe recordings"):
        model.transcribe([recording(0)])
    with pytest.raises(UserError, match="this model cannot read images"):
        model.encode_image([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(UserError, match="float array"):
        model.encode_audio([np.zeros((2, 8), np.float32)])
