"""Whisper tiny.en's own weights on recordings of a voice, where the package that brings them and the data are there."""

import json
import tarfile
from pathlib import Path

import pytest

from mmjax import api
from mmjax.data import audio
from tests.interop import ctranslate2
from tests.interop.test_whisper import SINGLE

SPEECH = Path(__file__).parents[2].parent / "shared" / "data" / "ljspeech_385.tar"
CLIPS = ("00001", "00003", "00007", "00008")  # short ones, with no numbers and names in them


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    source = ctranslate2.tiny_english()
    if source is None:
        pytest.skip(f"{ctranslate2.PACKAGE.replace('_', '-')} is not installed")
    if not SPEECH.exists():
        pytest.skip(f"{SPEECH} is not here")
    folder = tmp_path_factory.mktemp("tiny") / "whisper-tiny.en"
    ctranslate2.convert(source, folder)
    return api.load(folder, mesh=SINGLE)


def words(text):
    return "".join(letter for letter in text.lower() if letter.isalpha() or letter == " ").split()


@pytest.mark.slow
def test_it_writes_down_what_was_read_out(model):
    with tarfile.open(SPEECH) as archive:
        clips = [audio.decode(archive.extractfile(f"{key}.opus").read()) for key in CLIPS]
        said = [json.load(archive.extractfile(f"{key}.json"))["transcript"] for key in CLIPS]
    heard = model.transcribe(clips)
    assert [words(text) for text in heard] == [words(text) for text in said]
