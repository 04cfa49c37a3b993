"""Samples to a log-mel spectrogram, on the device: hosts ship samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_LINEAR_HZ, _HZ_PER_MEL = 1000.0, 200.0 / 3  # Slaney's scale is linear up to here, with so many Hz to a mel
_LOG_STEP = np.log(6.4) / 27  # and logarithmic above
_LEAST, _DECADES = 1e-10, 8.0  # power that counts as silence; what is kept below the loudest value


def log_mel(
    audio: Float[Array, "batch samples"], rate: int, fft: int, hop: int, mels: int
) -> Float[Array, "batch frames mels"]:
    """The spectrogram that Whisper reads ("Robust Speech Recognition via Large-Scale Weak Supervision", Radford et al.
    2023, section 2.2), float32, with samples / hop frames.

    A frame is the power spectrum of `fft` samples around its middle under a Hann window, averaged by triangular filters
    on the mel scale. Then come the decimal logarithm, cut off 8 below the loudest value of the clip, and (x + 4) / 4.

    The Fourier transform is a product with its matrix: unlike an FFT it is partitioned along the batch by XLA, and it
    takes the precision of float32 wherever it runs.

    Args:
      audio: float32, filled up to the length of a clip; at its ends it is mirrored.
      rate: samples a second.
      fft: samples in a frame.
      hop: samples from one frame to the next.
      mels: how many filters.
    """
    frames = audio.shape[1] // hop
    padded = jnp.pad(audio.astype(jnp.float32), ((0, 0), (fft // 2, fft // 2)), mode="reflect")
    steps = -(-fft // hop)  # a frame is so many steps of `hop` samples, the last one cut
    padded = jnp.pad(padded, ((0, 0), (0, max(0, (frames + steps - 1) * hop - padded.shape[1]))))
    hops = padded[:, : (frames + steps - 1) * hop].reshape(audio.shape[0], -1, hop)
    framed = jnp.concatenate([hops[:, step : step + frames] for step in range(steps)], axis=2)[..., :fft]
    exact = jax.lax.Precision.HIGHEST
    real, imaginary = jnp.split(jnp.matmul(framed, fourier_matrix(fft), precision=exact), 2, axis=2)
    power = jnp.matmul(real**2 + imaginary**2, mel_filters(rate, fft, mels), precision=exact)
    logarithm = jnp.log10(jnp.maximum(power, _LEAST))
    loudest = logarithm.max(axis=(1, 2), keepdims=True)
    return (jnp.maximum(logarithm, loudest - _DECADES) + 4) / 4


@functools.cache
def fourier_matrix(fft: int) -> Float[np.ndarray, "fft bins2"]:
    """Real and imaginary parts of the discrete Fourier transform of windowed samples, side by side, for the bins from 0
    to half of the rate. The window is Hann's, periodic.
    """
    places = np.arange(fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * places / fft)
    angles = 2 * np.pi * np.outer(places, np.arange(fft // 2 + 1)) / fft
    return (np.concatenate([np.cos(angles), -np.sin(angles)], axis=1) * window[:, None]).astype(np.float32)


@functools.cache
def mel_filters(rate: int, fft: int, mels: int) -> Float[np.ndarray, "bins mels"]:
    """Triangular filters, evenly spaced between 0 and half of the rate on the mel scale of Slaney's Auditory Toolbox
    (1998), each one with an area of 1.
    """
    bins = np.arange(fft // 2 + 1) * rate / fft
    edges = _hertz(np.linspace(0, _mel(rate / 2), mels + 2))
    below, middle, above = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - below) / (middle - below)
    falling = (above - bins[:, None]) / (above - middle)
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (above - below)).astype(np.float32)


def _mel(hertz: float) -> float:
    if hertz < _LINEAR_HZ:
        return hertz / _HZ_PER_MEL
    return _LINEAR_HZ / _HZ_PER_MEL + np.log(hertz / _LINEAR_HZ) / _LOG_STEP


def _hertz(mel: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    first_log = _LINEAR_HZ / _HZ_PER_MEL
    return np.where(
        mel < first_log, mel * _HZ_PER_MEL, _LINEAR_HZ * np.exp(_LOG_STEP * (np.maximum(mel, first_log) - first_log))
    )
