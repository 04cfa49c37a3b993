"""Writes goldens/whisper.npz: what transformers makes of a small Whisper model and a few recordings.

    python -m tests.interop.make_goldens_whisper

Needs `transformers` and `torch`. Neither the weights nor the recordings are stored: `whispers` draws them again.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.interop import folders, peers, whispers

GOLDENS = folders.GOLDENS / "whisper.npz"
CLIPS = 6
LANGUAGES = {"detected": None, "en": "en", "de": "de"}


def texts() -> np.ndarray:
    """Ids for the decoder to read, int32 [clips, 12]."""
    rng = np.random.default_rng(0)
    return np.concatenate(
        [np.full((CLIPS, 1), whispers.START), rng.integers(0, 256, (CLIPS, 11))], axis=1, dtype=np.int32
    )


def load(folder: Path):
    """(model, feature extractor) of transformers."""
    transformers = peers.transformers()
    model, report = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    faults = {name: found for name, found in report.items() if found}
    assert not faults, faults
    return model.eval(), transformers.WhisperFeatureExtractor.from_pretrained(folder)


def features(extractor, clips: list[np.ndarray]):
    """What the model of transformers reads."""
    return extractor(clips, sampling_rate=whispers.RATE, return_tensors="pt").input_features


def outputs(model, inputs, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's tokens, and the decoder's logits for these ids."""
    import torch

    with torch.no_grad():
        found = model(input_features=inputs, decoder_input_ids=torch.from_numpy(ids).long())
    return found.encoder_last_hidden_state.numpy(), found.logits.numpy()


def generated(model, inputs, **options) -> list[list[int]]:
    """Greedily, each without its prompt and what comes after its end."""
    import torch

    with torch.no_grad():
        found = model.generate(inputs, num_beams=1, do_sample=False, **options)
    special = {*range(whispers.START, whispers.NO_TIMESTAMPS + 1)}
    rows = [[index for index in row if index not in special] for row in found.tolist()]
    return [row[: row.index(whispers.END)] if whispers.END in row else row for row in rows]


def padded(rows: list[list[int]]) -> np.ndarray:
    """As one array, -1 behind each row."""
    length = whispers.CONFIG["max_target_positions"]
    return np.array([row + [-1] * (length - len(row)) for row in rows], np.int32)


def main() -> None:
    clips, arrays = [whispers.clip(number) for number in range(CLIPS)], {}
    with tempfile.TemporaryDirectory() as folder:
        model, extractor = load(whispers.write(Path(folder) / "english"))
        inputs = features(extractor, clips)
        arrays["tokens"], arrays["logits"] = outputs(model, inputs, texts())
        arrays["english"] = padded(generated(model, inputs))
        model, _ = load(whispers.write(Path(folder) / "multilingual", multilingual=True))
        for name, language in LANGUAGES.items():
            for task in ("transcribe", "translate"):
                options = {"language": language, "task": task}
                arrays[f"{name}_{task}"] = padded(generated(model, inputs, **options))
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == "__main__":
    main()
