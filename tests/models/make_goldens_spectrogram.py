"""Writes goldens/spectrogram.npz: what transformers' WhisperFeatureExtractor makes of a few clips of one second.

    python -m tests.models.make_goldens_spectrogram

Needs `transformers`. The clips are not stored: `clip` makes the same ones again.
"""

from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).with_name("goldens") / "spectrogram.npz"
RATE = 16_000
CASES = [(mels, name) for mels in (80, 128) for name in ("chirp", "noise", "short")]


def clip(name: str) -> np.ndarray:
    """float32 [samples], a second at most."""
    rng, seconds = np.random.default_rng(0), np.arange(RATE) / RATE
    if name == "chirp":
        return (0.3 * np.sin(2 * np.pi * (100 + 3_000 * seconds) * seconds)).astype(np.float32)
    noise = rng.normal(0, 0.1, RATE) * (1 + np.sin(2 * np.pi * 4 * seconds))
    return noise.astype(np.float32)[: RATE if name == "noise" else 5_000]


def processed(samples: np.ndarray, mels: int, seconds: int) -> np.ndarray:
    """float32 [frames, mels] of a clip, filled up to so many seconds."""
    import transformers

    extractor = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)
    return extractor(samples, sampling_rate=RATE, return_tensors="np").input_features[0].T


def main() -> None:
    GOLDENS.parent.mkdir(exist_ok=True)
    arrays = {f"{name}_{mels}": processed(clip(name), mels, 1) for mels, name in CASES}
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == "__main__":
    main()
