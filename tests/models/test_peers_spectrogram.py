"""The log-mel spectrogram against the live feature extractor of transformers, on clips of 30 seconds."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import audio
from tests.models.make_goldens_spectrogram import CASES, RATE, clip, processed
from tests.models.test_spectrogram import spectrogram

transformers = pytest.importorskip("transformers")

SPEECH = Path(__file__).parents[2].parent / "shared" / "data" / "ljspeech_385.tar"


@pytest.mark.parametrize(("mels", "name"), CASES)
def test_synthetic_clips_match(mels, name):
    (found,) = spectrogram(clip(name), mels, 30 * RATE)
    np.testing.assert_allclose(found, processed(clip(name), mels, 30), atol=1e-4, rtol=0)


def test_speech_matches():
    if not SPEECH.exists():
        pytest.skip(f"{SPEECH} is not here")
    with tarfile.open(SPEECH) as archive:
        for number in range(4):
            samples, rate = audio.decode(archive.extractfile(f"{number:05d}.opus").read())
            assert rate == RATE and json.load(archive.extractfile(f"{number:05d}.json"))["transcript"]
            (found,) = spectrogram(samples, 80, 30 * RATE)
            np.testing.assert_allclose(found, processed(samples, 80, 30), atol=1e-4, rtol=0)
