"""The log-mel spectrogram against what transformers computed, and against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data import audio
from mmjax.models.spectrogram import fourier_matrix, log_mel, mel_filters
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import batch_sharding
from tests.models.make_goldens_spectrogram import CASES, GOLDENS, RATE, clip


def spectrogram(samples, mels=80, length=RATE, **others):
    settings = {"rate": RATE, "fft": 400, "hop": 160, "mels": mels} | others
    return np.asarray(log_mel(jnp.asarray(audio.windows(samples, length)), **settings))


@pytest.mark.parametrize(("mels", "name"), CASES)
def test_the_spectrogram_is_that_of_transformers(mels, name):
    with np.load(GOLDENS) as goldens:
        wanted = goldens[f"{name}_{mels}"]
    (found,) = spectrogram(clip(name), mels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_a_clip_does_not_depend_on_the_others_of_its_batch():
    loud, quiet = clip("chirp"), clip("noise") / 1000
    together = spectrogram(np.concatenate([loud, quiet]))
    np.testing.assert_allclose(together[1], spectrogram(quiet)[0], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.5


@pytest.mark.parametrize(("fft", "hop"), [(400, 160), (256, 128), (200, 80), (512, 100), (100, 100)])
def test_frames_are_power_spectra_around_their_middle(fft, hop):
    samples = clip("noise")
    padded = np.pad(samples.astype(np.float64), fft // 2, mode="reflect")
    window = np.hanning(fft + 1)[:-1]
    frames = np.stack([padded[start : start + fft] * window for start in range(0, len(samples) - hop + 1, hop)])
    power = np.abs(np.fft.rfft(frames)) ** 2 @ mel_filters(RATE, fft, 20)
    logarithm = np.log10(np.maximum(power, 1e-10))
    wanted = (np.maximum(logarithm, logarithm.max() - 8) + 4) / 4
    np.testing.assert_allclose(spectrogram(samples, 20, fft=fft, hop=hop)[0], wanted, atol=1e-4)


def test_silence_has_one_value():
    np.testing.assert_allclose(spectrogram(np.zeros(10, np.float32)), (np.log10(1e-10) + 4) / 4)


def test_what_is_far_below_the_loudest_is_cut_off():
    found = spectrogram(np.pad(clip("chirp"), (0, RATE)), length=2 * RATE)[0]
    np.testing.assert_allclose(found[150:], found.max() - 2, atol=1e-6)


def test_the_filters_have_an_area_of_one():
    filters = mel_filters(RATE, 16_000, 40)  # bins of 1 Hz
    np.testing.assert_allclose(filters.sum(axis=0), 1, rtol=1e-2)
    peaks = filters.argmax(axis=0)
    assert (np.diff(peaks) > 0).all() and peaks[-1] < RATE / 2


def test_the_fourier_matrix_is_not_computed_anew():
    assert fourier_matrix(400) is fourier_matrix(400) and fourier_matrix(400).shape == (400, 402)


def test_a_batch_stays_where_it_lies():
    """An FFT would be gathered on every device: XLA partitions none along its batch."""
    mesh = make_mesh()
    batch = jax.ShapeDtypeStruct((8, RATE), jnp.float32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: log_mel(x, RATE, 400, 160, 80)).lower(batch).compile()
    assert "all-gather" not in compiled.as_text()
