"""CoCa in open_clip's layout, beside open_clip."""

import copy

import jax
import numpy as np
import pytest

from mmjax.interop import pretrained, registry, table
from mmjax.models.multimodal import Text
from mmjax.sharding.mesh import make_mesh
from tests.interop import folders, open_clip_peer, peers

open_clip = open_clip_peer.library()
import torch  # noqa: E402

START, END = "<start_of_text>", "<end_of_text>"
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


# A seed and how large the end token's weights are, so that some of the greedy texts end, and not all.
ENDS = {
    "queries": (3, 2.0),
    "quick_gelu": (3, 2.0),
    "one_width": (1, 2.0),
    "parallel": (1, 1.5),
    "cascade": (1, 1.5),
    "class_token": (2, 2.0),
    "end_token": (0, 1.0),
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
        # What follows the last token predicts nothing; without a class token ours does not see padding there.
        counted = ids[:, 1:] != 0
        for ours, theirs in zip([*found[:2], found[2][counted]], [*wanted[:2], wanted[2][counted]], strict=True):
            assert ours.shape == theirs.shape
            assert folders.relative_error(ours, theirs) < peers.TOLERANCE


def words(count):
    """A tokenizer whose texts tell their ids: a word is a number."""
    import tokenizers

    names = {str(index): index for index in range(count - 2)} | {START: count - 2, END: count - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([START, END])
    around = {"single": f"{START} $A {END}", "special_tokens": [(START, count - 2), (END, count - 1)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**around)
    return tokenizer


def assert_captions_agree(model, references, pixels):
    """Greedy texts; at the last place open_clip puts an end token whatever the model says."""
    length, vocab_size = model.config.model.encoders.text.length, model.config.model.encoders.text.vocab_size
    images = peers.normalized(pixels, model.config.model.encoders.image)
    tokens = {"sot_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    found = model.caption(list(pixels))
    for reference in references:
        ids = reference.generate(
            images, seq_len=length, min_seq_len=0, generation_type="top_k", top_k=1, fixed_output_length=True, **tokens
        ).numpy()
        ended = (ids[:, : length - 1] == vocab_size - 1).any(axis=1)
        wanted = [model.tokenizer.decode(row[: length - 1]) for row in ids]
        for text, begin, whole in zip(found, wanted, ended, strict=True):
            assert text == begin if whole else text.startswith(begin)
    assert ended.any() and not ended.all() and len(set(wanted)) > 3


@pytest.mark.parametrize("case", CASES)
def test_features_and_captions_agree_both_ways(case, tmp_path):
    settings, (seed, factor) = CASES[case], ENDS[case]

    def likely_end(reference):
        reference.text_decoder.text_projection.data[:, -1] *= factor

    reference = open_clip_peer.build(tmp_path / "theirs", settings, seed=seed, change=likely_end)
    words(settings["text_cfg"]["vocab_size"]).save(str(tmp_path / "theirs" / "tokenizer.json"))
    model, again = open_clip_peer.there_and_back(tmp_path / "theirs", tmp_path / "ours")
    pixels, ids = folders.pixels(4, 28), open_clip_peer.ids(settings["text_cfg"], 4)
    assert_agrees(model, (reference, again), pixels, ids)
    if settings["text_cfg"]["embed_cls"]:  # without, open_clip has no mask for a part of a text
        assert_captions_agree(model, (reference, again), folders.pixels(12, 28))


@pytest.mark.slow
def test_features_and_caption_logits_agree_in_the_published_shape(tmp_path):
    settings = open_clip.get_model_config("coca_ViT-B-32")
    reference = open_clip_peer.build(tmp_path / "theirs", settings)
    model, again = open_clip_peer.there_and_back(tmp_path / "theirs", tmp_path / "ours")
    pixels, ids = folders.pixels(2, 224), open_clip_peer.ids(settings["text_cfg"], 2)
    assert_agrees(model, (reference, again), pixels, ids)


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14", "coca_base"])
def test_every_tensor_of_the_published_models_has_its_place(name):
    with torch.device("meta"):
        reference = open_clip.create_model(name, pretrained=None, load_weights=False, device="meta")
    family = registry.FAMILIES["open_clip"]
    config = family.to_config({"model_cfg": open_clip.get_model_config(name)}, {})
    shapes = pretrained.shapes_of(config, make_mesh(devices=jax.devices()[:1]))
    expected = table.expected(family.table(config), shapes)
    assert expected == {key: tuple(value.shape) for key, value in reference.state_dict().items()}
