"""SigLIP and SigLIP 2 beside `transformers.SiglipModel` and `Siglip2Model`."""

import jax
import numpy as np
import pytest

from mmjax import config as configs
from mmjax.data.image_reader import Reader
from tests.interop import folders, peers
from tests.interop.test_siglip import pictures

transformers = peers.transformers()
import torch  # noqa: E402
from PIL import Image  # noqa: E402

SMALL = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 100,
        "max_position_embeddings": 12,
        "projection_size": 24,
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
SMALL_NAFLEX = {
    "text_config": SMALL["text_config"],
    "vision_config": {key: value for key, value in SMALL["vision_config"].items() if key != "image_size"}
    | {"patch_size": 4, "num_patches": 25},
}
# google/siglip-base-patch16-224 is SiglipConfig's default; google/siglip2-base-patch16-224 has Gemma's vocabulary.
LARGE_VOCABULARY = {"text_config": {"vocab_size": 256_000}}


def reference_of(kind, settings):
    """A model with random weights, and ids for it."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    shape = (4, config.text_config.max_position_embeddings)
    ids = np.random.default_rng(1).integers(0, config.text_config.vocab_size, shape).astype(np.int32)
    return peers.randomized(getattr(transformers, f"{kind}Model")(config)), ids


def set_logits(reference, inputs, ids):
    """A scale above 100, as SigLIP 2 has, and a bias with which the probabilities are neither 0 nor 1."""
    with torch.no_grad():
        reference.logit_scale.fill_(4.7244535)
        reference.logit_bias.fill_(0)
        reference.logit_bias.fill_(-reference(**inputs, input_ids=torch.tensor(ids)).logits_per_image.median())


def check(model, exported, reference, images, inputs, ids):
    """Embeddings and probabilities, ours beside those of their model and of the one that they load from our export."""
    image, text = (
        model.encode_rows(name, len(ids), lambda rows, own=own: jax.tree.map(lambda values: values[rows], own), 4)
        for name, own in (("image", images), ("text", ids))
    )
    for theirs in (reference, transformers.AutoModel.from_pretrained(exported).eval()):
        with torch.inference_mode():
            wanted = theirs(**inputs, input_ids=torch.tensor(ids))
        assert folders.relative_error(image, wanted.image_embeds.numpy()) < peers.TOLERANCE
        assert folders.relative_error(text, wanted.text_embeds.numpy()) < peers.TOLERANCE
        probabilities = wanted.logits_per_image.sigmoid().numpy()
        assert (probabilities > 0.5).any() and (probabilities < 0.5).any()
        assert folders.relative_error(model.similarity(image, text), probabilities) < peers.TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [SMALL, pytest.param({}, marks=pytest.mark.slow), pytest.param(LARGE_VOCABULARY, marks=pytest.mark.slow)],
    ids=["small", "siglip-base", "siglip2-base"],
)
def test_features_and_probabilities_agree_both_ways(settings, tmp_path):
    reference, ids = reference_of("Siglip", settings)
    pixels = folders.pixels(4, reference.config.vision_config.image_size)
    inputs = {"pixel_values": peers.normalized(pixels, configs.image_encoder(mean=(0.5,) * 3, std=(0.5,) * 3))}
    set_logits(reference, inputs, ids)
    model, exported = peers.there_and_back(reference, tmp_path)
    check(model, exported, reference, pixels, inputs, ids)


@pytest.mark.parametrize(
    "settings",
    [SMALL_NAFLEX, pytest.param(LARGE_VOCABULARY, marks=pytest.mark.slow)],
    ids=["small", "siglip2-base-naflex"],
)
def test_images_of_any_shape_agree_both_ways(settings, tmp_path):
    reference, ids = reference_of("Siglip2", settings)
    patch = reference.config.vision_config.patch_size
    processor = transformers.Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=30)
    images = pictures()
    inputs = dict(processor([Image.fromarray(each) for each in images], return_tensors="pt"))
    set_logits(reference, inputs, ids)
    model, exported = peers.there_and_back(reference, tmp_path, processor.save_pretrained)
    rows = Reader.of(model.config.model.encoders.image)(images)
    check(model, exported, reference, rows, inputs, ids)
