"""CLIP and SigLIP in open_clip's layout, beside open_clip."""

import copy
import json

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.data import image as image_ops
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


SENTENCES = [
    "a photo of a cat",
    "It's  a_DOG!\n",
    "caf&eacute; ½ “quoted” ﬁne — naïve",
    "",
    "!",
    "ＡＢＣ 123 don't 中文 🙂",
    "word " * 30,
]


@pytest.fixture(scope="module")
def own_vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    open_clip_peer.build(folder, small(text={"vocab_size": 49_408}))
    return folder


def assert_same_ids(model, folder, length=12):
    wanted = open_clip.get_tokenizer(f"local-dir:{folder}")(SENTENCES).numpy()
    np.testing.assert_array_equal(model.tokenizer.encode(SENTENCES, length), wanted)


def test_the_own_vocabulary_gives_the_same_ids_both_ways(own_vocabulary, tmp_path):
    """From the package, since the folder has none; what is exported is open_clip's own again."""
    model = api.load(own_vocabulary)
    assert_same_ids(model, own_vocabulary)
    pretrained.save(tmp_path / "out", model.config, model.params, model.tokenizer, "open_clip")
    assert_same_ids(model, tmp_path / "out")
    assert_same_ids(api.load(tmp_path / "out"), tmp_path / "out")
    text = model.encode_text(SENTENCES)
    reference = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")[0].eval()
    with torch.inference_mode():
        ids = open_clip.get_tokenizer(f"local-dir:{own_vocabulary}")(SENTENCES)
        wanted = reference.encode_text(ids, normalize=True).numpy()
    assert folders.relative_error(text, wanted) < peers.TOLERANCE


def test_files_of_hugging_face_beside_the_own_vocabulary_give_the_same_ids(own_vocabulary, tmp_path):
    """As in many folders on the hub: CLIP's tokenizer of transformers, which open_clip does not read."""
    import transformers
    from open_clip.tokenizer import SimpleTokenizer

    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(name, name): index for name, index in own.encoder.items()}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=sorted(own.bpe_ranks, key=own.bpe_ranks.get))
    for file in own_vocabulary.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    assert_same_ids(api.load(tmp_path), tmp_path)


@pytest.mark.parametrize("clean", [None, "lower", "whitespace", "canonicalize"])
@pytest.mark.parametrize("strip", [False, True])
def test_named_tokenizers_give_the_same_ids_both_ways(clean, strip, tmp_path):
    options = ({"clean": clean} if clean else {}) | ({"strip_sep_token": True} if strip else {})
    text = {"hf_tokenizer_name": "somebody/words", "tokenizer_kwargs": options, "pool_type": "last"}
    open_clip_peer.build(tmp_path / "theirs", small(text=text))
    words(tmp_path / "theirs")
    model = api.load(tmp_path / "theirs")
    assert_same_ids(model, tmp_path / "theirs")
    if not strip:  # a text without an end cannot be exported
        pretrained.save(tmp_path / "ours", model.config, model.params, model.tokenizer, "open_clip")
        assert_same_ids(model, tmp_path / "ours")


def words(folder):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "it's", "It's", "its", "a_DOG!", "a_dog!", "dog"]
    names += ["½", '"quoted"', "quoted", "fine", "!", "?", "don't", "dont", "Don't", "café", "word"]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    around = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_images_are_resized_as_there(resize, interpolation, tmp_path):
    from PIL import Image

    preprocess = open_clip_peer.PREPROCESS | {"resize_mode": resize, "interpolation": interpolation}
    open_clip_peer.build(tmp_path / "theirs", SMALL, preprocess)
    model, _ = open_clip_peer.there_and_back(tmp_path / "theirs", tmp_path / "ours")
    encoder = model.config.model.encoders.image
    transforms = [
        open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / name}")[1] for name in ("theirs", "ours")
    ]
    for height, width in ((28, 28), (37, 50), (51, 28), (90, 41), (30, 33)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        found = peers.normalized(image_ops.for_evaluation(image, image_ops.fit_of(encoder))[None], encoder)[0]
        for transform in transforms:
            np.testing.assert_allclose(found, transform(Image.fromarray(image)), atol=1e-5)
