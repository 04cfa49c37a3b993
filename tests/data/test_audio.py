"""Audio files to samples: what every format gives, resampling, what is refused, windows."""

import io
import wave

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data import audio
from mmjax.errors import RecordError, UserError

# Format, subtype, and how far a decoded sample may be from the encoded one.
FORMATS = [
    ("WAV", "PCM_U8", 1e-2),
    ("WAV", "PCM_16", 1e-4),
    ("WAV", "PCM_24", 1e-6),
    ("WAV", "FLOAT", 0),
    ("WAVEX", "PCM_16", 1e-4),
    ("AIFF", "PCM_16", 1e-4),
    ("FLAC", "PCM_16", 1e-4),
    ("OGG", "VORBIS", 3e-2),
    ("MP3", "MPEG_LAYER_III", 5e-2),
]


def tone(rate=16_000, seconds=1.0, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples, rate=16_000, form="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "subtype", "tolerance"), FORMATS)
def test_formats_give_the_samples_that_were_encoded(form, subtype, tolerance):
    samples, rate = audio.decode(encoded(tone(), form=form, subtype=subtype))
    assert rate == 16_000 and samples.dtype == np.float32 and samples.shape == (16_000,)
    np.testing.assert_allclose(samples, tone(), atol=tolerance, rtol=0)


def test_opus_keeps_the_pitch():
    """Opus delays the sound by a part of a period, so samples cannot be compared."""
    samples, rate = audio.decode(encoded(tone(), form="OGG", subtype="OPUS"))
    assert rate == 16_000 and abs(len(samples) - 16_000) < 400
    assert np.abs(np.fft.rfft(samples[:16_000])).argmax() == 440


def test_a_file_of_the_standard_library_is_read():
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8_000, 0, "NONE", ""))
        file.writeframes(np.array([0, 16_384, -32_768], "<i2").tobytes())
    samples, rate = audio.decode(buffer.getvalue())
    assert rate == 8_000
    np.testing.assert_array_equal(samples, [0, 0.5, -1])


def test_channels_are_averaged():
    samples, _ = audio.decode(encoded(np.stack([tone(), -tone(), 3 * tone()], axis=1), form="WAV", subtype="FLOAT"))
    np.testing.assert_allclose(samples, tone(), atol=1e-6)


def test_long_recordings_come_whole_from_several_blocks(monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 1_000)
    samples, _ = audio.decode(encoded(np.stack([tone()] * 3, axis=1), form="FLAC"))
    np.testing.assert_allclose(samples, tone(), atol=1e-4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Format not recognised"),
        (b"RIFF no such thing", "Format not recognised"),
        (encoded(tone())[:30], "No 'data' chunk"),
        (encoded(tone(), form="FLAC")[:3_000], "sync"),
        (encoded(tone()[:0]), "no samples"),
        (encoded(tone(), rate=999), "999 samples a second"),
        (encoded(np.array([0, np.inf], np.float32), subtype="FLOAT"), "not finite"),
    ],
    ids=["nothing", "unknown", "cut header", "cut flac", "empty", "rate", "infinite"],
)
def test_what_is_no_recording_is_refused_in_one_line(data, reason):
    with pytest.raises(RecordError, match=reason) as raised:
        audio.decode(data)
    assert "\n" not in str(raised.value) and " at 0x" not in str(raised.value)


def test_recordings_beyond_the_limit_are_refused(monkeypatch):
    data = encoded(tone(), form="FLAC")
    monkeypatch.setattr(audio, "MAX_SAMPLES", 15_999)
    with pytest.raises(RecordError, match="more than 15,999 samples"):
        audio.decode(data)


def test_resampling_may_not_pass_the_limit_either(monkeypatch):
    monkeypatch.setattr(audio, "MAX_SAMPLES", 20_000)
    with pytest.raises(UserError, match="more than 20,000 samples"):
        audio.samples_of((tone(), 8_000), 16_000)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_files_give_samples_or_a_record_error(data):
    form, subtype, _ = data.draw(st.sampled_from(FORMATS))
    damaged = bytearray(encoded(tone(seconds=0.1), form=form, subtype=subtype))
    for place in data.draw(st.lists(st.integers(0, min(len(damaged), 200) - 1), min_size=1, max_size=5)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        samples, _ = audio.decode(bytes(damaged))
    except RecordError:
        return
    assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate):
    resampled = audio.resample(tone(rate), rate, 16_000)
    assert resampled.dtype == np.float32 and len(resampled) == 16_000
    np.testing.assert_allclose(resampled[200:-200], tone()[200:-200], atol=2e-3)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    assert np.abs(audio.resample(tone(48_000, hertz=12_000), 48_000, 16_000)[200:-200]).max() < 0.01


def test_recordings_are_files_arrays_or_pairs(tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(encoded(tone(48_000), 48_000, subtype="FLOAT"))
    wanted = audio.resample(tone(48_000), 48_000, 16_000)
    for given_as in (path, str(path), (tone(48_000), 48_000), wanted, wanted.astype(np.float64)):
        np.testing.assert_allclose(audio.samples_of(given_as, 16_000), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("recording", "reason"),
    [
        (np.zeros((2, 5), np.float32), r"not float32 \[2, 5\]"),
        (np.zeros(5, np.int16), r"not int16 \[5\]"),
        (np.zeros(0, np.float32), "at least one sample"),
        (np.array([np.nan], np.float32), "finite"),
        ((np.zeros(5, np.float32), 3), "3 samples a second"),
        ((np.zeros(5, np.float32), "16000"), "pair"),
        ((1, 2, 3), "pair"),
    ],
)
def test_other_recordings_are_refused(recording, reason):
    with pytest.raises(UserError, match=reason):
        audio.samples_of(recording, 16_000)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the recording .*none\.wav: No such file"):
        audio.samples_of(tmp_path / "none.wav", 16_000)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(UserError, match=r"text\.wav: 8 bytes cannot be decoded as audio"):
        audio.samples_of(tmp_path / "text.wav", 16_000)


def test_windows_follow_each_other_and_end_in_silence():
    samples = np.arange(1, 8, dtype=np.float32)
    np.testing.assert_array_equal(audio.windows(samples, 3), [[1, 2, 3], [4, 5, 6], [7, 0, 0]])
    np.testing.assert_array_equal(audio.windows(samples, 7), [samples])
    np.testing.assert_array_equal(audio.windows(samples[:1], 3), [[1, 0, 0]])
