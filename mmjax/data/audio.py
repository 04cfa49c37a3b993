"""Audio files to samples: one channel, float32, at the rate that a model reads.

libsndfile decodes: WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF and what else it knows.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmjax.errors import RecordError, UserError, one_line

Samples = Float[np.ndarray, " samples"]

MAX_SAMPLES = 2**28  # of one recording, before and after resampling: 1 GiB, 4.6 hours at 16 kHz
RATES = (1_000, 768_000)  # samples a second
_BLOCK_VALUES = 2**22  # that are decoded at a time, of all channels


def decode(data: bytes) -> tuple[Samples, int]:
    """Decodes an encoded recording; its channels are averaged. One without compression may be cut short.

    Returns:
      The samples, mostly within -1..1, and how many make a second.

    Raises:
      RecordError: the bytes are no recording, are damaged, hold no samples, some that are not finite, or more than
        MAX_SAMPLES, or their rate is outside RATES.
    """
    import soundfile

    try:
        with soundfile.SoundFile(_Bytes(data)) as file:
            _check_rate(file.samplerate)
            _check_count(file.frames)
            return _read(file), file.samplerate
    except Exception as error:  # of the kinds that decoders raise on hostile bytes there is no list
        # soundfile puts an address in memory before the text of libsndfile
        reason = getattr(error, "error_string", "") or one_line(error)
        raise RecordError(f"{len(data)} bytes cannot be decoded as audio: {reason}") from error


class _Bytes(io.BytesIO):
    """Where damaged headers point before the start, it is the start: soundfile would print a traceback of its own."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(max(0, offset) if whence == io.SEEK_SET else offset, whence)


def _read(file: Any) -> Samples:
    block, parts, count = max(1, _BLOCK_VALUES // file.channels), [], 0
    while len(part := file.read(block, dtype="float32", always_2d=True)):
        count += len(part)
        _check_count(count)  # what a header says may be wrong
        parts.append(part[:, 0] if file.channels == 1 else part.mean(axis=1))
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(samples):
        raise ValueError("it has no samples")
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are not finite")
    return samples


def _check_count(count: int) -> None:
    if count > MAX_SAMPLES:
        raise ValueError(f"it has more than {MAX_SAMPLES:,} samples")


def _check_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{rate:,} samples a second are outside {RATES[0]:,} to {RATES[1]:,}")


def resample(samples: Samples, rate: int, new_rate: int) -> Samples:
    """The same sound with another number of samples a second: a polyphase filter with a Kaiser window, which removes
    what the new rate cannot hold.

    Raises:
      ValueError: the result has more than MAX_SAMPLES samples, or a rate is outside RATES.
    """
    if rate == new_rate:
        return samples
    for each in (rate, new_rate):
        _check_rate(each)
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    _check_count(-(-len(samples) * up // down))
    from scipy import signal

    return signal.resample_poly(samples, up, down).astype(np.float32)


def load_file(path: str | Path, rate: int) -> Samples:
    """Reads and decodes a file, and resamples it.

    Raises:
      UserError: the file cannot be read or is no recording.
    """
    try:
        return resample(*decode(Path(path).read_bytes()), rate)
    except OSError as error:
        raise UserError(f"cannot read the recording {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def samples_of(audio: Any, rate: int) -> Samples:
    """The samples of a recording, `rate` a second.

    Args:
      audio: a file; a float array [samples] of that rate; or a pair of an array and its own rate.
      rate: the one that is wanted.

    Raises:
      UserError: the file is missing or is no recording, or the array has another shape or type, is empty or is not
        finite.
    """
    if isinstance(audio, str | Path):
        return load_file(audio, rate)
    own_rate = rate
    if isinstance(audio, tuple):
        if len(audio) != 2 or not isinstance(audio[1], int | np.integer):
            raise UserError("a recording is a file, an array [samples], or a pair (array, rate)")
        audio, own_rate = audio[0], int(audio[1])
    samples = np.asarray(audio)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise UserError(f"a recording is a float array [samples] within -1..1, not {samples.dtype} {[*samples.shape]}")
    samples = samples.astype(np.float32)
    if not len(samples) or not np.isfinite(samples).all():
        raise UserError("a recording has at least one sample, and all of them are finite")
    try:
        return resample(samples, own_rate, rate)
    except ValueError as error:
        raise UserError(f"a recording: {error}") from None


def windows(samples: Samples, length: int) -> Float[np.ndarray, "windows length"]:
    """Cuts a recording into windows that follow each other; the last one is filled up with silence."""
    count = max(1, -(-len(samples) // length))
    return np.pad(samples, (0, count * length - len(samples))).reshape(count, length)
