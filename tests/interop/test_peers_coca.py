"""CoCa in open_clip's layout, beside open_clip."""

import copy

import jax
import numpy as np
import pytest

from mmjax.models.multimodal import Text
from tests.interop import folders, open_clip_peer, peers

open_clip = open_clip_peer.library()
import torch  # noqa: E402

SMALL = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 28,
        "layers": 2,
        "width": 32,
        "head_width": 8,
        "patch_size": 7,
        "attentional_pool": True,
        "attn_pooler_queries": 5,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 100,
        "width": 24,
        "heads": 3,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 12, "vocab_size": 100, "width": 24, "heads": 4, "layers": 3},
}


def small(vision=None, text=None, multimodal=None, **model):
    """The settings of a small model, but these."""
    found = copy.deepcopy(SMALL) | model
    for name, changes in (("vision_cfg", vision), ("text_cfg", text), ("multimodal_cfg", multimodal)):
        found[name] |= changes or {}
    return found


CASES = {
    "queries": small(),
    "quick_gelu": small({"ls_init_value": 0.4}, {"ls_init_value": 0.3}, {"ls_init_value": 0.3}, quick_gelu=True),
    "one_width": small({"width": 24, "pool_type": "avg"}, init_logit_bias=-10),
    "parallel": small({"width": 24, "attentional_pool": "parallel", "attn_pooler_heads": 3}),
    "cascade": small({"width": 24, "attentional_pool": "cascade", "attn_pooler_heads": 3}),
    "class_token": small({"width": 24, "attentional_pool": False}),
    "end_token": small({"width": 24, "attentional_pool": False, "final_ln_after_pool": True}, {"embed_cls": False}),
}


def caption_logits(model, pixels, ids):
    """Of ours: of the tokens after the first, [texts, length - 1, vocab]."""

    def run(params, pixels, ids):
        known = {"params": params}
        image, _ = model.module.apply(known, "image", pixels, method="tokens")
        tokens, valid = model.module.apply(known, "text", ids, method="tokens")
        return model.module.apply(known, Text(ids, tokens, valid), image, method="caption")

    with jax.set_mesh(model.mesh):
        return np.asarray(jax.jit(run)(model.params, pixels, ids))


def assert_agrees(model, references, pixels, ids):
    found = [*open_clip_peer.features(model, pixels, ids), caption_logits(model, pixels, ids)]
    for each in found:
        assert np.abs(each - each.mean(axis=0)).max() > 0.01
    for reference in references:
        wanted = list(open_clip_peer.their_features(reference, model, pixels, ids))
        wanted[0] = wanted[0].reshape(found[0].shape)  # "parallel" and "cascade" keep an axis of one query there
        with torch.inference_mode():
            images = peers.normalized(pixels, model.config.model.encoders.image)
            wanted.append(reference(images, torch.tensor(ids.astype(np.int64)))["logits"].numpy())
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.shape == theirs.shape
            assert folders.relative_error(ours, theirs) < peers.TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_features_and_caption_logits_agree_both_ways(case, tmp_path):
    settings = CASES[case]
    reference = open_clip_peer.build(tmp_path / "theirs", settings)
    model, again = open_clip_peer.there_and_back(tmp_path / "theirs", tmp_path / "ours")
    pixels, ids = folders.pixels(4, 28), open_clip_peer.ids(settings["text_cfg"], 4)
    assert_agrees(model, (reference, again), pixels, ids)
