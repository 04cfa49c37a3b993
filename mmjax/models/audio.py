"""Recordings to tokens."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from mmjax.models.spectrogram import log_mel


class AudioEmbed(nn.Module):
    """Samples to tokens, as Whisper makes them (Radford et al. 2023, section 2.2): two convolutions over time on the
    log-mel spectrogram, each with a GELU, the second one with a stride of 2; then the positions are added.

    A second has sample_rate / hop frames and half as many tokens. The positions start as sines and cosines, and are a
    parameter: Whisper keeps them fixed, `optimizer.rules` can.

    Raises:
      ValueError: more samples than there are positions for.
    """

    sample_rate: int
    fft: int
    hop: int
    mels: int
    tokens: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, audio: Float[Array, "batch samples"]) -> Float[Array, "batch tokens embed"]:
        x = log_mel(audio, self.sample_rate, self.fft, self.hop, self.mels).astype(self.dtype)
        for name, stride in (("conv1", 1), ("conv2", 2)):
            convolution = nn.Conv(self.width, (3,), stride, padding=1, dtype=self.dtype, name=name)
            x = nn.gelu(convolution(x), approximate=False)
        if x.shape[1] > self.tokens:
            raise ValueError(
                f"{audio.shape[1]} samples make {x.shape[1]} tokens, and there are {self.tokens} positions"
            )
        table = self.param("position", lambda _, shape: jnp.asarray(sinusoids(*shape)), (self.tokens, self.width))
        return x + table[: x.shape[1]].astype(x.dtype)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "length width"]:
    """Sines of geometrically spaced frequencies and then their cosines (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10_000.0 ** (-np.arange(width // 2) / (width // 2 - 1 or 1))
    angles = np.outer(np.arange(length), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
