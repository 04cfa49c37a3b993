"""CLIP beside `transformers.CLIPModel`."""

import json

import numpy as np
import pytest

from tests.interop import folders, peers

transformers = peers.transformers()
import torch  # noqa: E402

SMALL = {
    "projection_dim": 16,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 100,
        "max_position_embeddings": 12,
        "eos_token_id": 99,
        "bos_token_id": 98,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 56,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}
PUBLISHED = {"vision_config": {"patch_size": 32}}  # openai/clip-vit-base-patch32: the rest is CLIPConfig's default


def with_activation(settings, name):
    towers = {tower: settings.get(tower, {}) | {"hidden_act": name} for tower in ("text_config", "vision_config")}
    return settings | towers


def ids_of(config):
    ids = np.random.default_rng(1).integers(0, config.vocab_size - 2, (3, config.max_position_embeddings))
    ids[np.arange(3), [4, 9, config.max_position_embeddings - 1]] = config.vocab_size - 1
    return ids.astype(np.int32)


@pytest.mark.parametrize(
    ("settings", "activation"),
    [(SMALL, "quick_gelu"), (SMALL, "gelu"), pytest.param(PUBLISHED, "quick_gelu", marks=pytest.mark.slow)],
    ids=["small", "small-gelu", "b32"],
)
def test_features_and_probabilities_agree_both_ways(settings, activation, tmp_path):
    config = transformers.CLIPConfig(**with_activation(settings, activation))
    reference = peers.randomized(transformers.CLIPModel(config))
    processor = {
        "size": {"shortest_edge": config.vision_config.image_size},
        "crop_size": config.vision_config.image_size,
    }

    def prepare(folder):
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"do_center_crop": True}))

    model, exported = peers.there_and_back(reference, tmp_path, prepare)
    pixels, ids = folders.pixels(3, config.vision_config.image_size), ids_of(config.text_config)
    image, text = (
        model.encode_rows(modality, 3, lambda rows, inputs=inputs: inputs[rows])
        for modality, inputs in (("image", pixels), ("text", ids))
    )
    for theirs in (reference, transformers.AutoModel.from_pretrained(exported).eval()):
        inputs = {
            "pixel_values": peers.normalized(pixels, model.config.model.encoders.image),
            "input_ids": torch.tensor(ids),
        }
        with torch.inference_mode():
            wanted = theirs(**inputs)
        assert folders.relative_error(image, wanted.image_embeds.numpy()) < peers.TOLERANCE
        assert folders.relative_error(text, wanted.text_embeds.numpy()) < peers.TOLERANCE
        probabilities = wanted.logits_per_image.softmax(dim=1).numpy()
        np.testing.assert_allclose(model.similarity(image, text), probabilities, atol=1e-4)


def test_the_activations_are_told_apart(tmp_path):
    config = transformers.CLIPConfig(**with_activation(SMALL, "quick_gelu"))
    reference = peers.randomized(transformers.CLIPModel(config))
    reference.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(with_activation(settings, "gelu")))
    from mmjax import api

    ids = ids_of(config.text_config)
    found = api.load(tmp_path).encode_rows("text", 3, lambda rows: ids[rows])
    with torch.inference_mode():
        wanted = reference.get_text_features(torch.tensor(ids)).pooler_output
    assert folders.relative_error(found, torch.nn.functional.normalize(wanted).numpy()) > 1e-3
