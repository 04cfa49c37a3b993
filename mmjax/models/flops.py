"""How many floating-point operations a model needs, for the utilisation that a run reports."""

from collections.abc import Collection, Mapping
from typing import Any

from mmjax.models import variants
from mmjax.models.multimodal import audio_samples, audio_tokens, has_class_token, output_width, part_size, tower_size
from mmjax.models.token_drop import kept_tokens


def tower_flops(encoder: Mapping[str, Any], training: bool = False) -> int:
    """FLOPs of one input's forward pass: 2 for each multiply-add of a matrix product, nothing else.

    In training, only the tokens that `token_drop` keeps go through the Transformer.
    """
    size = tower_size(encoder)
    if "image_size" in encoder:
        patch, patches = variants.parse(encoder["variant"])[1], patch_count(encoder)
        kept = kept_tokens(patches, encoder["token_drop"]) if training else patches
        tokens = kept + has_class_token(encoder)
        embed = patches * patch**2 * 3 * size.width
    elif "sample_rate" in encoder:
        read, frames = audio_tokens(encoder), audio_samples(encoder) // encoder["hop"]
        tokens = kept_tokens(read, encoder["token_drop"]) if training else read
        embed = 3 * size.width * (frames * encoder["mels"] + read * size.width)  # the spectrogram is left out
    else:
        tokens, embed = encoder["length"] + encoder["class_token"], 0
    projections = tokens * (4 * size.width**2 + (3 if encoder["gated"] else 2) * size.width * size.mlp_dim)
    attention = 2 * tokens**2 * size.width
    pooling = _pooling_flops(encoder, tokens)
    return 2 * (embed + size.depth * (projections + attention)) + pooling


def _pooling_flops(encoder: Mapping[str, Any], tokens: int) -> int:
    """FLOPs of the attention of learned queries to so many tokens."""
    width, queries = output_width(encoder), encoder.get("queries", 0)
    multiplied = 0
    if queries:
        multiplied += 2 * tokens * tower_size(encoder).width * width + 2 * queries * (width**2 + tokens * width)
    if encoder["pooling"] in ("map", "query"):
        multiplied += (queries or tokens) * 2 * width**2
    return 2 * multiplied


def patch_count(encoder: Mapping[str, Any]) -> int:
    """How many patches an image has."""
    return (encoder["image_size"] // variants.parse(encoder["variant"])[1]) ** 2


def part_flops(model: Mapping[str, Any], name: str) -> int:
    """FLOPs of one text's pass through the fusion or the decoder, cross-attention included, but not the vocabulary."""
    encoders, text = model["encoders"], tower_size(model["encoders"]["text"])
    part = part_size(model[name], text)
    width, length = part["width"], encoders["text"]["length"]
    modality = part.get("modality", "image")
    tokens = audio_tokens if modality == "audio" else patch_count
    seen = part.get("image_queries") or encoders[modality].get("queries") or tokens(encoders[modality])
    image_width = output_width(encoders[modality])
    if part.get("image") == "prefix":
        length, seen = length + seen, 0
    mlps = 2 if part.get("cross_mlp") else 1
    own = length * (4 * width**2 + mlps * 2 * width * part["mlp_dim"]) + 2 * length**2 * width
    cross = 2 * length * width**2 + 2 * seen * image_width * width + 2 * length * seen * width if seen else 0
    depth = text.depth if part["reads"] == "tower" else part["depth"]
    return 2 * depth * (own + cross)


def vocabulary_flops(model: Mapping[str, Any], name: str) -> int:
    """FLOPs of one text's logits over the vocabulary, from the fusion's or the decoder's tokens."""
    text = model["encoders"]["text"]
    return 2 * text["length"] * part_size(model[name], tower_size(text))["width"] * text["vocab_size"]


def train_flops(model: Mapping[str, Any], parts: Collection[str]) -> int:
    """FLOPs of one training example: the backward pass costs twice the forward pass.

    `parts` are those that the objectives read. Matching sends three texts through the fusion; masked modelling one,
    and one more through the text tower.
    """
    encoders = {name: tower_flops(encoder, True) for name, encoder in model["encoders"].items() if name in parts}
    total = sum(encoders.values())
    if "fusion" in parts:
        passes = 3 * ("matching" in parts) + ("masked" in parts)
        total += passes * part_flops(model, "fusion")
        if "masked" in parts:
            total += vocabulary_flops(model, "fusion") + encoders["text"]
    if "decoder" in parts:
        total += part_flops(model, "decoder") + vocabulary_flops(model, "decoder")
    return 3 * total


# Dense bfloat16 peak of one device, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The peak of a device by the name that jax gives it, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
