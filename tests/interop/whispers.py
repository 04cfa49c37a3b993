"""Small Whisper models as Hugging Face folders: every tensor is drawn from its name, so none has to be stored."""

import zlib
from pathlib import Path

import numpy as np

from tests.interop import folders

END, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = range(256, 263)  # after the 256 bytes
SPECIAL = ("endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "notimestamps")
CONFIG = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "activation_function": "gelu",
    "vocab_size": 264,
    "num_mel_bins": 80,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_source_positions": 50,
    "max_target_positions": 24,
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "pad_token_id": END,
    "bos_token_id": END,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
PROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "WhisperProcessor",
    "feature_size": 80,
    "sampling_rate": 16_000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
}
RATE = 16_000


def generation(multilingual: bool) -> dict:
    """The content of `generation_config.json`: only what can be printed in ASCII may be said."""
    ids = {name: CONFIG[name] for name in CONFIG if name.endswith("_token_id")}
    shared = ids | {
        "max_length": CONFIG["max_target_positions"],
        "suppress_tokens": [*range(94, 256), *range(START, 264)],
        "begin_suppress_tokens": [5, END],
        "no_timestamps_token_id": NO_TIMESTAMPS,
        "is_multilingual": multilingual,
    }
    if not multilingual:
        return shared
    tasks = {"transcribe": TRANSCRIBE, "translate": TRANSLATE}
    return shared | {"lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN}, "task_to_id": tasks}


def filled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor, large enough that texts depend on the recording."""
    rng, fan_in = np.random.default_rng(zlib.crc32(name.encode())), int(np.prod(shape[1:]))
    size = 0.4 if len(shape) == 1 or "embed" in name else 3 * fan_in**-0.5
    values = rng.normal(float(name.endswith("norm.weight")), size, shape).astype(np.float32)
    if name == "model.decoder.embed_tokens.weight":  # tied to the head: of one length, so that no token always wins
        values = np.float32(0.4) * np.sign(values)
        values[END] *= 1.3
    return values


def tokenizer() -> str:
    """A `tokenizer.json`: a token for each byte, and the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in SPECIAL])
    around = {f"<|{name}|>": made.token_to_id(f"<|{name}|>") for name in SPECIAL}
    made.post_processor = processors.TemplateProcessing(
        "<|startoftranscript|> <|notimestamps|> $A <|endoftext|>", special_tokens=[*around.items()]
    )
    return made.to_str()


def write(folder: Path, multilingual: bool = False) -> Path:
    """Writes such a folder; returns it."""
    files = {"generation_config": generation(multilingual), "preprocessor_config": PROCESSOR}
    folders.write(folder, "whisper", CONFIG, filled, **files)
    (folder / "tokenizer.json").write_text(tokenizer())
    return folder


def clip(number: int, seconds: float = 0.9) -> np.ndarray:
    """A recording: float32 [samples], another one for each number."""
    rng, time = np.random.default_rng(number), np.arange(int(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * hertz * time * (1 + slope * time)) for hertz, slope in rng.uniform(0, 1, (4, 2)) * 2000]
    loudness = 1 + np.sin(2 * np.pi * rng.uniform(1, 8) * time)
    return (0.05 * loudness * np.sum(tones, axis=0) + rng.normal(0, 0.01, len(time))).astype(np.float32)
