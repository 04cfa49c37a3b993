"""Whisper ("Robust Speech Recognition via Large-Scale Weak Supervision", Radford et al. 2023), as
`transformers.WhisperForConditionalGeneration` has it.

The towers are `audio` and `decoder`. `encoders.text` says how wide the decoder is and what its texts are; there is no
text tower. What `generation_config.json` says of prompts and of tokens that are never chosen becomes `model.speech`;
timestamps are not predicted, so what it says of them is left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop.family import Family, Json
from mmjax.interop.table import TRANSPOSED, Row, Table, dense, norm

_MODEL = {
    "vocab_size": 51_865,
    "num_mel_bins": 80,
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "activation_function": "gelu",
    "pad_token_id": 50_256,
    "eos_token_id": 50_256,
    "decoder_start_token_id": 50_257,
}
_SIGNAL = {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160}


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a Whisper model."""
    model = _MODEL | theirs
    for key, value in {"activation_function": "gelu", "scale_embedding": False, "tie_word_embeddings": True}.items():
        if model.get(key, value) != value:
            raise UserError(f"config.json: {key} is {model[key]!r}, and only {value!r} is known here")
    signal = _SIGNAL | files.get("preprocessor_config.json", {})
    if signal.get("feature_size", model["num_mel_bins"]) != model["num_mel_bins"]:
        raise UserError(
            f"preprocessor_config.json: feature_size {signal['feature_size']} for a model of {model['num_mel_bins']}"
        )
    own = {"width": model["d_model"], "activation": "gelu", "norm_epsilon": 1e-5, "key_bias": False}
    config = configs.default()
    config.model.parts, config.model.embed_dim = ("audio", "decoder"), model["d_model"]
    config.model.encoders.audio = configs.audio_encoder(
        **own,
        **_sizes(model, "encoder"),
        sample_rate=signal["sampling_rate"],
        fft=signal["n_fft"],
        hop=signal["hop_length"],
        mels=model["num_mel_bins"],
        seconds=_seconds(model["max_source_positions"], signal),
        projection=False,
    )
    config.model.encoders.text = configs.text_encoder(
        **own,
        **_sizes(model, "decoder"),
        vocab_size=model["vocab_size"],
        length=model["max_target_positions"],
        causal=True,
        pad_id=model["pad_token_id"],
        end_id=model["eos_token_id"],
    )
    config.model.decoder = configs.decoder(
        depth=model["decoder_layers"], modality="audio", start=False, tied=True, head_bias=False
    )
    config.model.speech = _speech(model | files.get("generation_config.json", {}))
    return config


def _sizes(model: Json, side: str) -> dict[str, int]:
    return {
        "depth": model[f"{side}_layers"],
        "heads": model[f"{side}_attention_heads"],
        "mlp_dim": model[f"{side}_ffn_dim"],
    }


def _seconds(positions: int, signal: Json) -> int:
    samples = 2 * positions * signal["hop_length"]
    seconds, rest = divmod(samples, signal["sampling_rate"])
    if rest or signal.get("chunk_length", seconds) != seconds:
        wanted = signal.get("chunk_length", "a whole number of")
        raise UserError(
            f"preprocessor_config.json: {positions} positions are {samples / signal['sampling_rate']:g} seconds, not "
            f"{wanted} seconds"
        )
    return seconds


def _speech(generation: Json) -> ConfigDict:
    """From generation_config.json; before 2023 its settings stood in config.json."""
    languages = sorted((generation.get("lang_to_id") or {}).items(), key=lambda item: item[1])
    if not generation.get("is_multilingual", bool(languages)):
        languages = []
    tasks = generation.get("task_to_id") or {} if languages else {}
    no_timestamps = generation.get("no_timestamps_token_id")
    forced = [index for _, index in generation.get("forced_decoder_ids") or ()]
    prompt = [no_timestamps] if no_timestamps is not None else forced
    return configs.speech(
        start_id=generation["decoder_start_token_id"],
        languages=tuple(token.strip("<|>") for token, _ in languages),
        language_ids=tuple(index for _, index in languages),
        transcribe_id=tasks.get("transcribe", -1),
        translate_id=tasks.get("translate", -1),
        prompt=tuple(prompt) if None not in prompt else (),
        suppress=tuple(generation.get("suppress_tokens") or ()),
        suppress_first=tuple(generation.get("begin_suppress_tokens") or ()),
    )


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a Whisper model."""
    from mmjax.models.multimodal import audio_tokens, part_size, tower_size

    audio, text = config.model.encoders.audio, config.model.encoders.text
    decoder = part_size(config.model.decoder.to_dict(), tower_size(text))
    encoder = tower_size(audio)
    return {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "activation_function": "gelu",
        "vocab_size": text.vocab_size,
        "num_mel_bins": audio.mels,
        "d_model": encoder.width,
        "encoder_layers": encoder.depth,
        "encoder_attention_heads": encoder.heads,
        "encoder_ffn_dim": encoder.mlp_dim,
        "decoder_layers": decoder["depth"],
        "decoder_attention_heads": decoder["heads"],
        "decoder_ffn_dim": decoder["mlp_dim"],
        "max_source_positions": audio_tokens(audio),
        "max_target_positions": text.length,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        **_token_ids(config),
    }


def _token_ids(config: ConfigDict) -> dict[str, int]:
    text = config.model.encoders.text
    return {
        "pad_token_id": text.pad_id,
        "bos_token_id": text.end_id,
        "eos_token_id": text.end_id,
        "decoder_start_token_id": config.model.speech.start_id,
    }


def files(config: ConfigDict) -> dict[str, Json]:
    """The files of the feature extractor and of generation."""
    audio, text, speech = config.model.encoders.audio, config.model.encoders.text, config.model.speech
    processor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": audio.mels,
        "sampling_rate": audio.sample_rate,
        "n_fft": audio.fft,
        "hop_length": audio.hop,
        "chunk_length": audio.seconds,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    generation: dict[str, Any] = _token_ids(config) | {
        "max_length": text.length,
        "suppress_tokens": list(speech.suppress),
        "begin_suppress_tokens": list(speech.suppress_first),
        "is_multilingual": bool(speech.languages),
    }
    if len(speech.prompt) == 1:
        generation["no_timestamps_token_id"] = speech.prompt[0]
    elif speech.prompt:
        generation["forced_decoder_ids"] = [[place, index] for place, index in enumerate(speech.prompt, 1)]
    if speech.languages:
        tokens = (f"<|{language}|>" for language in speech.languages)
        generation["lang_to_id"] = dict(zip(tokens, speech.language_ids, strict=True))
        generation["task_to_id"] = {"transcribe": speech.transcribe_id, "translate": speech.translate_id}
    return {"preprocessor_config.json": processor, "generation_config.json": generation}


def _attention(ours: str, theirs: str) -> Iterator[Row]:
    for name in ("query", "key", "value"):
        yield from dense(f"{ours}/{name}", f"{theirs}.{name[0]}_proj", bias=name != "key")
    yield from dense(f"{ours}/out", f"{theirs}.out_proj")


def _stack(ours: str, theirs: str, cross: bool) -> Iterator[Row]:
    blocks, layers = f"{ours}/blocks", f"{theirs}.layers.{{}}"
    yield from _attention(f"{blocks}/attention", f"{layers}.self_attn")
    yield from norm(f"{blocks}/norm1", f"{layers}.self_attn_layer_norm")
    if cross:
        yield from _attention(f"{blocks}/cross_attention", f"{layers}.encoder_attn")
        yield from norm(f"{blocks}/norm_cross", f"{layers}.encoder_attn_layer_norm")
    yield from dense(f"{blocks}/mlp/up", f"{layers}.fc1")
    yield from dense(f"{blocks}/mlp/down", f"{layers}.fc2")
    yield from norm(f"{blocks}/norm2", f"{layers}.final_layer_norm")
    yield from norm(f"{ours}/norm", f"{theirs}.layer_norm")


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.WhisperForConditionalGeneration`.

    The head, `proj_out.weight`, is the embedding of the tokens; some files hold it twice.
    """
    encoder, decoder = "model.encoder", "model.decoder"
    rows = [
        *(Row(f"audio/embed/conv{i}/kernel", f"{encoder}.conv{i}.weight", TRANSPOSED) for i in (1, 2)),
        *(Row(f"audio/embed/conv{i}/bias", f"{encoder}.conv{i}.bias") for i in (1, 2)),
        Row("audio/embed/position", f"{encoder}.embed_positions.weight"),
        *_stack("audio/transformer", encoder, cross=False),
        Row("decoder/embed/token_embed/embedding", f"{decoder}.embed_tokens.weight"),
        Row("decoder/embed/position", f"{decoder}.embed_positions.weight"),
        *_stack("decoder/transformer", decoder, cross=True),
    ]
    fixed = {"logit_scale": float(np.log(config.model.logit_scale)), "logit_bias": config.model.logit_bias}
    return Table(tuple(rows), fixed, tied={"proj_out.weight": f"{decoder}.embed_tokens.weight"})


FAMILY = Family("whisper", to_config, to_theirs, table, files)
