"""CLIP and SigLIP in open_clip's layout, beside open_clip."""

import copy
import json

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.interop import pretrained, registry, table
from mmjax.models.multimodal import tower_size
from mmjax.sharding.mesh import make_mesh
from tests.interop import folders, open_clip_peer, peers

open_clip = open_clip_peer.library()
import torch  # noqa: E402

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 48, "heads": 4, "layers": 3},
}


def small(vision=None, text=None, **model):
    """The settings of a small model, but these."""
    found = copy.deepcopy(SMALL) | model
    found["vision_cfg"] |= vision or {}
    found["text_cfg"] |= text or {}
    return found


def without_text(name):
    return name.removeprefix("text.")


CASES = {
    "gelu": small(),
    "quick_gelu": small(quick_gelu=True),
    "custom_text": small(custom_text=True, init_logit_bias=-10, init_logit_scale=2.0),
    "nonscalar": small(nonscalar_logit_scale=True, init_logit_bias=-7.5),
    "clipa": small(
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-3}},
    ),
    "avg": small({"pool_type": "avg", "ls_init_value": 0.3, "mlp_ratio": 2.7}, {"pool_type": "eos", "eos_id": 7}),
    "tanh": small(
        {"act_kwargs": {"approximate": "tanh"}}, {"act_kwargs": {"approximate": "tanh"}, "ls_init_value": 0.5}
    ),
    "sincos": small({"pos_embed_type": "sin_cos_2d"}, {"pool_type": "first", "no_causal_mask": True}),
    "unprojected": small(text={"width": 24, "heads": 2, "proj_type": "none"}),
}


@pytest.mark.parametrize("case", CASES)
def test_features_agree_both_ways(case, tmp_path):
    settings = CASES[case]
    reference = open_clip_peer.build(tmp_path / "theirs", settings)
    model, again = open_clip_peer.there_and_back(tmp_path / "theirs", tmp_path / "ours", without_text)
    pixels, ids = folders.pixels(3, settings["vision_cfg"]["image_size"]), open_clip_peer.ids(settings["text_cfg"])
    if case == "avg":
        ids[:, 5] = settings["text_cfg"]["eos_id"]
    assert_features_agree(model, (reference, again), pixels, ids)
    assert model.logits()["logit_scale"] == pytest.approx(reference.logit_scale.exp().item(), rel=1e-5)
    bias = 0 if reference.logit_bias is None else reference.logit_bias.item()
    assert model.logits()["logit_bias"] == pytest.approx(bias, rel=1e-6)


def assert_features_agree(model, references, pixels, ids):
    found = open_clip_peer.features(model, pixels, ids)
    assert np.abs(found[0] - found[0].mean(axis=0)).max() > 0.01
    assert np.abs(found[1] - found[1].mean(axis=0)).max() > 0.01
    for reference in references:
        for ours, theirs in zip(found, open_clip_peer.their_features(reference, model, pixels, ids), strict=True):
            assert folders.relative_error(ours, theirs) < peers.TOLERANCE


PUBLISHED = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_features_agree_in_published_shapes(name, tmp_path):
    settings = open_clip.get_model_config(name)
    reference = open_clip_peer.build(tmp_path / "theirs", settings)
    model, again = open_clip_peer.there_and_back(tmp_path / "theirs", tmp_path / "ours")
    pixels, ids = folders.pixels(2, 224), open_clip_peer.ids(settings["text_cfg"], 2)
    assert_features_agree(model, (reference, again), pixels, ids)


def test_quick_gelu_is_only_what_the_settings_say(tmp_path):
    reference = open_clip_peer.build(tmp_path, small(quick_gelu=True))
    pixels, ids = folders.pixels(3, 28), open_clip_peer.ids(SMALL["text_cfg"])
    settings = json.loads((tmp_path / "open_clip_config.json").read_text())
    settings["model_cfg"]["quick_gelu"] = False
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    other = api.load(tmp_path)
    for ours, theirs in zip(
        open_clip_peer.features(other, pixels, ids),
        open_clip_peer.their_features(reference, other, pixels, ids),
        strict=True,
    ):
        assert folders.relative_error(ours, theirs) > 1e-3


def readable():
    """The published models that are Transformers of open_clip's own, or SigLIP's."""
    for name in open_clip.list_models():
        settings = open_clip.get_model_config(name)
        timm, hugging_face = settings["vision_cfg"].get("timm_model_name"), settings["text_cfg"].get("hf_model_name")
        is_transformer = "siglip" in timm if timm else isinstance(settings["vision_cfg"]["layers"], int)
        if is_transformer and not hugging_face and "multimodal_cfg" not in settings:
            yield name


@pytest.mark.parametrize("name", list(readable()))
def test_every_tensor_of_the_published_models_has_its_place(name):
    settings = open_clip.get_model_config(name)
    with torch.device("meta"):
        reference = open_clip.create_model(name, pretrained=None, load_weights=False, device="meta")
    config = registry.FAMILIES["open_clip"].to_config({"model_cfg": settings}, {})
    shapes = pretrained.shapes_of(config, make_mesh(devices=jax.devices()[:1]))
    rows = registry.FAMILIES["open_clip"].table(config)
    expected = table.expected(rows, shapes)
    assert expected == {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    image = config.model.encoders.image
    if image.pooling == "map":
        block = reference.visual.trunk.blocks[0]
        assert (block.mlp.act.__class__.__name__ == "GELUTanh") == (image.activation == "gelu_tanh")
        assert block.attn.num_heads == tower_size(image).heads
        assert reference.visual.trunk.patch_embed.img_size == (image.image_size,) * 2
