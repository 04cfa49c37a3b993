"""The objectives of `peer_cases` as transformers and open_clip compute them, on the same weights and inputs.

`VALUE_AND_GRADIENT` needs torch, transformers and open_clip; importing this module does not.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.objectives import peer_cases as cases
from tests.objectives.peer_cases import Case, Flat
from tests.programs import ROOT

NEEDED = ("torch", "transformers", "open_clip")
# A module of mmjax, or a weight that has none -> the peer's; of stacked layers a list with one for each.
Table = dict[str, str | list[str]]
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
BLOCK = {
    **{f"attention/{part}": f"attention.self.{part}" for part in ("query", "key", "value")},
    "attention/out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    **{f"cross_attention/{part}": f"crossattention.self.{part}" for part in ("query", "key", "value")},
    "cross_attention/out": "crossattention.output.dense",
    "norm_cross": "crossattention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "norm2": "output.LayerNorm",
}


def embeddings(ours: str, theirs: str) -> Table:
    return {
        f"{ours}/token_embed": f"{theirs}.word_embeddings",
        f"{ours}/position": f"{theirs}.position_embeddings.weight",
        f"{ours}/norm": f"{theirs}.LayerNorm",
    }


def blocks(ours: str, theirs: str, numbers: Sequence[int]) -> Table:
    return {f"{ours}/{mine}": [f"{theirs}.{number}.{other}" for number in numbers] for mine, other in BLOCK.items()}


def token_head(ours: str, theirs: str) -> Table:
    return {
        f"{ours}/transform": f"{theirs}.transform.dense",
        f"{ours}/norm": f"{theirs}.transform.LayerNorm",
        f"{ours}/vocab_bias": f"{theirs}.bias",
    }


def peer_names(table: Table, path: str) -> str | list[str] | None:
    """The peer's weight for one of mmjax, one for each layer, or none."""
    if path in table:
        return table[path]
    module, _, leaf = path.rpartition("/")
    found = table.get(module)
    if isinstance(found, list):
        return [f"{name}.{LEAVES[leaf]}" for name in found]
    return found and f"{found}.{LEAVES[leaf]}"


def turned(path: str, value: np.ndarray) -> np.ndarray:
    """PyTorch's kernels are [out, in]."""
    return value.swapaxes(-1, -2) if path.endswith("/kernel") else value


def to_peer(table: Table, weights: Flat) -> Flat:
    """mmjax's weights under the peer's names."""
    named = {}
    for path, value in weights.items():
        found = peer_names(table, path)
        if isinstance(found, list):
            named |= dict(zip(found, turned(path, value), strict=True))
        elif found:
            named[found] = turned(path, value)
    return named


def from_peer(table: Table, gradient: Flat, weights: Flat) -> Flat:
    """The peer's gradient under mmjax's names, 0 for weights that the peer does not have."""
    ours = {}
    for path, value in weights.items():
        found = peer_names(table, path)
        if isinstance(found, list):
            ours[path] = turned(path, np.stack([gradient[name] for name in found]))
        else:
            ours[path] = turned(path, gradient[found]) if found else np.zeros_like(value)
    return ours


def import_transformers() -> ModuleType:
    """It imports torchvision where that is installed, which may be one for another build of torch."""
    if importlib.util.find_spec("torchvision") is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            importlib.import_module("quickstart").import_torchvision()
    return importlib.import_module("transformers")


def open_clip_losses() -> ModuleType:
    """The module `open_clip.loss` by itself: importing the package takes torchvision, which is not needed."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    spec = importlib.util.spec_from_file_location("open_clip_loss", package / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(given: Flat) -> dict:
    import torch

    return {
        name: torch.tensor(value, dtype=None if value.dtype == np.float32 else torch.long)
        for name, value in given.items()
    }


def compare(model, table: Table, case: Case, loss: Callable) -> tuple[float, Flat]:
    """The value of `loss(model, inputs)` and its gradient, with a case's weights in the model.

    Every weight that the model reads has to be in the table: the others are made not to be numbers.
    """
    import torch

    weights = {name: torch.tensor(value) for name, value in to_peer(table, case.weights).items()}
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(torch.nan)
    unread = model.load_state_dict(weights, strict=False)
    assert not unread.unexpected_keys
    model.eval()
    value = loss(model, tensors(case.inputs))
    value.backward()
    gradient = {
        name: weight.grad.numpy()
        for name, weight in model.named_parameters(remove_duplicate=False)
        if weight.grad is not None
    }
    return value.item(), from_peer(table, gradient, case.weights)


def blip_config(transformers: ModuleType):
    """A BLIP whose image tower is not used."""
    text = {
        "vocab_size": cases.VOCAB,
        "hidden_size": cases.WIDTH,
        "num_attention_heads": cases.HEADS,
        "intermediate_size": cases.MLP_DIM,
        "num_hidden_layers": cases.LAYERS,
        "max_position_embeddings": cases.LENGTH,
        "pad_token_id": cases.PAD,
        "bos_token_id": cases.START,
        "sep_token_id": cases.END,
        "label_smoothing": cases.LABEL_SMOOTHING,
    }
    vision = {
        "hidden_size": cases.IMAGE_WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
    }
    return transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)


def with_given_images(model):
    """The model with image tokens in place of its image tower's input."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class Given(torch.nn.Module):
        def forward(self, pixel_values, **settings):
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values)

    model.vision_model = Given()
    return model


def image_text_matching(case: Case) -> tuple[float, Flat]:
    """BLIP's matching head over the pairs of texts and images, right and wrong."""
    transformers = import_transformers()
    import torch

    model = with_given_images(transformers.BlipForImageTextRetrieval(blip_config(transformers)))
    table = embeddings("text/embed", "text_encoder.embeddings")
    table |= blocks("fusion/transformer/blocks", "text_encoder.encoder.layer", range(cases.LAYERS))
    table["fusion/match_head"] = "itm_head"

    def loss(model, given):
        ids, image = given["text"], given["image"]
        texts = torch.cat([ids, ids, ids[given["wrong_text"]]])
        images = torch.cat([image, image[given["wrong_image"]], image])
        labels = torch.tensor([1] * len(ids) + [0] * 2 * len(ids))
        scores = model(texts, images, attention_mask=(texts != cases.PAD).long()).itm_score
        return torch.nn.functional.cross_entropy(scores, labels)

    return compare(model, table, case, loss)


def captioning(case: Case) -> tuple[float, Flat]:
    """BLIP's captioner."""
    transformers = import_transformers()
    model = with_given_images(transformers.BlipForConditionalGeneration(blip_config(transformers)))
    table = embeddings("decoder/embed", "text_decoder.bert.embeddings")
    table |= blocks("decoder/transformer/blocks", "text_decoder.bert.encoder.layer", range(cases.LAYERS))
    table |= token_head("decoder/token_head", "text_decoder.cls.predictions")

    def loss(model, given):
        ids, there = given["text"], given["text"] != cases.PAD
        return model(given["image"], ids, there.long(), labels=ids.masked_fill(~there, -100)).loss

    return compare(model, table, case, loss)


def masked_language(case: Case) -> tuple[float, Flat]:
    """BERT, whose first layer is mmjax's text tower."""
    transformers = import_transformers()
    config = transformers.BertConfig(
        vocab_size=cases.VOCAB,
        hidden_size=cases.WIDTH,
        num_attention_heads=cases.HEADS,
        intermediate_size=cases.MLP_DIM,
        num_hidden_layers=1 + cases.LAYERS,
        max_position_embeddings=cases.LENGTH,
        pad_token_id=cases.PAD,
    )
    model = transformers.BertForMaskedLM(config)
    table = embeddings("text/embed", "bert.embeddings")
    table |= blocks("text/transformer/blocks", "bert.encoder.layer", [0])
    table |= blocks("fusion/transformer/blocks", "bert.encoder.layer", range(1, 1 + cases.LAYERS))
    table |= token_head("fusion/token_head", "cls.predictions")

    def loss(model, given):
        model.bert.embeddings.token_type_embeddings.weight.data.zero_()  # mmjax has no segments
        labels = given["text"].masked_fill(given["chosen"] == 0, -100)
        return model(given["hidden"], (given["text"] != cases.PAD).long(), labels=labels).loss

    return compare(model, table, case, loss)


def coca(case: Case) -> tuple[float, Flat]:
    """open_clip's loss of mmjax's embeddings and logits; its gradient goes on through mmjax's model."""
    import torch

    weights = cases.COCA_WEIGHTS
    function = open_clip_losses().CoCaLoss(weights["captioning"], weights["contrastive"], pad_id=cases.PAD)
    features, pull = jax.vjp(jax.jit(case.features), cases.as_tree(case.weights))
    given = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in features.items()}
    labels = torch.tensor(case.inputs["text"][:, 1:]).long()
    loss = sum(function(**given, labels=labels))
    loss.backward()
    (gradient,) = pull({name: jax.numpy.asarray(value.grad.numpy()) for name, value in given.items()})
    return loss.item(), {path: np.asarray(value) for path, value in flatten_dict(gradient, sep="/").items()}


VALUE_AND_GRADIENT = {
    "image_text_matching": image_text_matching,
    "captioning": captioning,
    "masked_language": masked_language,
    "coca": coca,
}
