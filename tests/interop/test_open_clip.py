"""open_clip's layout: the results of open_clip that make_goldens_open_clip.py stored, and what needs it not."""

import gzip
import importlib.util
import json
from importlib.machinery import ModuleSpec

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.data import text as tokenizers
from mmjax.errors import UserError
from mmjax.interop import open_clip, pretrained, timm_vit
from mmjax.models.multimodal import Text
from mmjax.models.variants import Size
from mmjax.sharding.mesh import make_mesh
from tests.interop import folders

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 2}
TEXT = {"context_length": 6, "vocab_size": 40, "width": 12, "heads": 2, "layers": 2}
CLIP = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
# A SigLIP tower that timm does not have: the goldens' maker registers it there, the tests here.
TIMM = "vit_tiny_patch4_siglip_8"
TRUNK = timm_vit.Trunk(Size(16, 2, 24, 2), 4, 8, "gelu_tanh")
MODELS = {
    "clip": CLIP,
    "clip_quick": CLIP | {"quick_gelu": True},
    "siglip": {
        "embed_dim": 16,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": 8, "timm_model_name": TIMM, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": TEXT
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
        | {"act_kwargs": {"approximate": "tanh"}},
    },
    "coca": {
        "embed_dim": 12,
        "custom_text": True,
        "vision_cfg": VISION
        | {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 6, "vocab_size": 40, "width": 12, "heads": 3, "layers": 2},
    },
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash", "interpolation": "bilinear"}


def pixels():
    return folders.pixels(3, 8)


def ids():
    return np.array([[38, 5, 7, 39, 0, 0], [38, 1, 2, 3, 4, 39], [38, 39, 0, 0, 0, 0]], np.int32)


def fill(name, shape):
    """As `folders.filled`, by open_clip's names of scales."""
    is_scale = len(shape) == 1 and name.endswith(".weight") and (".ln_" in name or "norm" in name or name[:3] == "ln_")
    return 3 * folders.filled(name, shape) + np.float32(is_scale)


@pytest.fixture(autouse=True)
def small_timm(monkeypatch):
    monkeypatch.setitem(timm_vit.TRUNKS, TIMM, TRUNK)


def write(folder, name="clip", **changes):
    settings = {"model_cfg": MODELS[name] | changes, "preprocess_cfg": PREPROCESS}
    return folders.write(folder, "open_clip", settings, fill)


def load(folder):
    return api.load(folder, mesh=make_mesh(devices=jax.devices()[:1]))


def embeddings(model):
    inputs = {"image": pixels(), "text": ids()}
    return {name: model.encode_rows(name, 3, lambda rows, own=each: own[rows]) for name, each in inputs.items()}


def caption_logits(model):
    def run(params, pixels, ids):
        known = {"params": params}
        image, _ = model.module.apply(known, "image", pixels, method="tokens")
        text = Text(ids, *model.module.apply(known, "text", ids, method="tokens"))
        return model.module.apply(known, text, image, method="caption")

    with jax.set_mesh(model.mesh):
        return np.asarray(jax.jit(run)(model.params, pixels(), ids()))


@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_open_clip(name, tmp_path):
    wanted = np.load(folders.GOLDENS / "open_clip.npz")
    model = load(write(tmp_path, name))
    found = embeddings(model) | ({"captions": caption_logits(model)} if name == "coca" else {})
    for output, value in found.items():
        assert folders.relative_error(value, wanted[f"{name}_{output}"]) < 1e-4
    assert model.logits()["logit_scale"] == pytest.approx(wanted[f"{name}_scale"].item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_is_the_same(name, tmp_path):
    model = load(write(tmp_path / "theirs", name))
    assert pretrained.save(tmp_path / "ours", model.config, model.params, None, "open_clip") == "open_clip"
    folders.assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())
    assert settings["preprocess_cfg"] == PREPROCESS
    again = load(tmp_path / "ours")
    assert again.config.to_dict() == model.config.to_dict()


def test_the_activation_is_what_quick_gelu_says():
    wanted = np.load(folders.GOLDENS / "open_clip.npz")
    for output in ("image", "text"):
        assert folders.relative_error(wanted[f"clip_{output}"], wanted[f"clip_quick_{output}"]) > 1e-3


def test_clip_is_one_model_in_both_layouts(tmp_path):
    model = load(write(tmp_path / "first"))
    assert pretrained.save(tmp_path / "clip", model.config, model.params, None) == "clip"
    other = load(tmp_path / "clip")
    pretrained.save(tmp_path / "last", other.config, other.params, None, "open_clip")
    folders.assert_same_tensors(tmp_path / "first", tmp_path / "last")
    for name, value in embeddings(model).items():
        np.testing.assert_array_equal(value, embeddings(other)[name])


def test_a_model_that_a_layout_cannot_hold_is_refused(tmp_path):
    coca, siglip = load(write(tmp_path / "coca", "coca")), load(write(tmp_path / "siglip", "siglip"))
    with pytest.raises(UserError, match="no model of the family clip.*"):
        pretrained.save(tmp_path / "out", coca.config, coca.params, None, "clip")
    with pytest.raises(UserError, match="timm has no SigLIP model of Trunk"):
        siglip.config.model.encoders.image.depth = 3
        pretrained.save(tmp_path / "out", siglip.config, siglip.params, None, "open_clip")
    with pytest.raises(UserError, match="crop_fraction is 0.9"):
        coca.config.model.encoders.image.crop_fraction = 0.9
        pretrained.save(tmp_path / "out", coca.config, coca.params, None, "open_clip")
    assert not (tmp_path / "out").exists()


def test_other_names_of_the_same_tensors_are_known(tmp_path):
    """Text towers as a module of their own (`custom_text`), and a scale with an axis."""
    folder = write(tmp_path / "bare")
    wanted = embeddings(load(folder))
    tensors = folders.tensors_of(folder)
    old = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    tensors = {f"text.{name}" if name.startswith(old) else name: value for name, value in tensors.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    custom = write(tmp_path / "custom", custom_text=True, nonscalar_logit_scale=True)
    (custom / "open_clip_model.safetensors").unlink()
    open_clip_store(custom, tensors)
    for name, value in embeddings(load(custom)).items():
        np.testing.assert_array_equal(value, wanted[name])


def open_clip_store(folder, tensors):
    from mmjax.interop import store

    store.save_tensors(folder / "open_clip_model.safetensors", tensors)


def test_of_two_layouts_transformers_is_read_where_its_weights_are(tmp_path):
    both, only = tmp_path / "both", tmp_path / "only"
    model = load(write(both))
    pretrained.save(tmp_path / "clip", model.config, model.params, None, "clip")
    for name in ("config.json", "model.safetensors"):
        (both / name).write_bytes((tmp_path / "clip" / name).read_bytes())
    mesh = make_mesh(devices=jax.devices()[:1])
    assert pretrained.load(both, mesh).family == "clip"
    write(only)
    (only / "config.json").write_text((both / "config.json").read_text())
    assert pretrained.load(only, mesh).family == "open_clip"
    # timm's folders of these models have its own settings and weights, those of the image tower, beside open_clip's.
    (both / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    assert pretrained.load(both, mesh).family == "open_clip"


FAULTS = {
    "vision_cfg.layers: .* is a ResNet's": {"vision_cfg": {"layers": [3, 4, 6, 3]}},
    "text_cfg.hf_model_name: 'roberta-base' is not supported": {"text_cfg": {"hf_model_name": "roberta-base"}},
    "vision_cfg.qk_norm: True is not supported": {"vision_cfg": {"qk_norm": True}},
    'vision_cfg.pool_typ: .* did you mean "pool_type"': {"vision_cfg": {"pool_typ": "tok"}},
    "text_cfg.act_kwargs": {"quick_gelu": True, "text_cfg": {"act_kwargs": {"approximate": "tanh"}}},
    "vision_cfg.norm_kwargs": {"vision_cfg": {"norm_kwargs": {"elementwise_affine": False}}},
    "text_cfg.pool_type: 'none'": {"text_cfg": {"pool_type": "none"}},
    "text_cfg.no_causal_mask: it reads the padding": {"text_cfg": {"no_causal_mask": True}},
    "vision_cfg.image_size: .* is no square": {"vision_cfg": {"image_size": [8, 16]}},
    "timm_model_name: 'convnext_base' is none of SigLIP's": {"vision_cfg": {"timm_model_name": "convnext_base"}},
    "vision_cfg.attentional_pool: 'serial'": {"vision_cfg": {"attentional_pool": "serial"}},
    "vision_cfg.attentional_pool: cascade needs a width of": {"vision_cfg": {"attentional_pool": "cascade"}},
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_cannot_be_expressed_is_named(message):
    changes = FAULTS[message]
    settings = {name: changes.get(name, {}) for name in ("vision_cfg", "text_cfg")}
    model = CLIP | changes | {name: CLIP[name] | change for name, change in settings.items()}
    with pytest.raises(UserError, match=message):
        open_clip.to_config({"model_cfg": model}, {})


def test_more_that_cannot_be_expressed():
    with pytest.raises(UserError, match="open_clip_config.json has no model_cfg"):
        open_clip.to_config(CLIP, {})
    for key, value in (("resize_mode", "longest"), ("interpolation", "nearest")):
        with pytest.raises(UserError, match=f"preprocess_cfg.{key}: '{value}' is none of"):
            open_clip.to_config({"model_cfg": CLIP, "preprocess_cfg": {key: value}}, {})
    coca = MODELS["coca"]
    for name, change in (("norm_kwargs", {"eps": 1e-6}), ("ls_init_value", 0.1)):
        with pytest.raises(UserError, match=name):
            open_clip.to_config({"model_cfg": coca | {"text_cfg": coca["text_cfg"] | {name: change}}}, {})


MERGES = ["#version", "a b", "ab c</w>", "d o", "do g</w>"]


def bpe(path):
    """A vocabulary of open_clip's form with a few merges."""
    path.write_bytes(gzip.compress("\n".join(MERGES).encode()))
    return path


def without_open_clip(monkeypatch, origin=None):
    """As if open_clip were not installed; or were, with its package there."""
    real = importlib.util.find_spec
    spec = None if origin is None else ModuleSpec("open_clip", None, origin=str(origin))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "open_clip" else real(name))


def test_open_clips_own_vocabulary_is_that_of_the_folder_or_of_the_package(tmp_path, monkeypatch):
    folder, package = write(tmp_path / "model"), tmp_path / "open_clip"
    package.mkdir()
    without_open_clip(monkeypatch)
    model = load(folder)
    assert model.tokenizer is None
    with pytest.raises(UserError, match=r"without a tokenizer.*put .*bpe_simple_vocab_16e6\.txt\.gz"):
        model.encode_text(["dog"])
    with pytest.raises(UserError, match="without a tokenizer"):
        load(write(tmp_path / "coca", "coca")).caption([*pixels()])
    wanted = tokenizers.load(bpe(package / open_clip_vocabulary())).encode(["A  DOG", "abc &amp; dog"], 6)
    without_open_clip(monkeypatch, package / "__init__.py")
    np.testing.assert_array_equal(load(folder).tokenizer.encode(["A  DOG", "abc &amp; dog"], 6), wanted)
    without_open_clip(monkeypatch)
    bpe(folder / open_clip_vocabulary())
    found = load(folder).tokenizer
    np.testing.assert_array_equal(found.encode(["A  DOG", "abc &amp; dog"], 6), wanted)
    assert (wanted[0, 0], wanted[0, -1], found.pad_id) == (found.start_id, 0, 0)


def open_clip_vocabulary():
    from mmjax.interop.open_clip_tokenizer import VOCABULARY

    return VOCABULARY


def test_an_exported_vocabulary_reads_the_same(tmp_path, monkeypatch):
    """Also texts with "!", which is the padding's id, and is no special token for that."""
    without_open_clip(monkeypatch)
    folder, texts = write(tmp_path / "model"), ["a dog!", "!", "ABC dog, don't", "caf&eacute;"]
    bpe(folder / open_clip_vocabulary())
    model = load(folder)
    pretrained.save(tmp_path / "out", model.config, model.params, model.tokenizer, "open_clip")
    again = load(tmp_path / "out")
    np.testing.assert_array_equal(again.tokenizer.encode(texts, 16), model.tokenizer.encode(texts, 16))
    settings = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert "hf_tokenizer_name" not in settings["model_cfg"]["text_cfg"]
    with pytest.raises(UserError, match="transformers would not: write it with --family=open_clip"):
        pretrained.save(tmp_path / "clip", model.config, model.params, model.tokenizer, "clip")


def words(path, special=("<pad>", "</s>")):
    import tokenizers as library

    names = [*special, "dog", "Dog", "dog!", "a_dog", "dogs", "?", "it's", "its", "it", "s", "unknown"]
    tokenizer = library.Tokenizer(
        library.models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="unknown")
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    end = special[1]
    tokenizer.post_processor = library.processors.TemplateProcessing(f"$A {end}", special_tokens=[(end, 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": special[0], "eos_token": end}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


CLEANED = {  # of "It's a_dog!  DOG"
    None: ["unknown", "unknown", "unknown", "</s>"],
    "lower": ["it's", "unknown", "dog", "</s>"],
    "canonicalize": ["its", "unknown", "dog", "dog", "</s>"],
}


@pytest.mark.parametrize("clean", CLEANED)
def test_texts_for_named_tokenizers_are_cleaned_as_their_settings_say(clean, tmp_path):
    options = {} if clean is None else {"tokenizer_kwargs": {"clean": clean}}
    folder = write(tmp_path / "model", text_cfg=TEXT | {"hf_tokenizer_name": "somebody/words"} | options)
    words(folder)
    model = load(folder)
    names = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ids = model.tokenizer.encode(["It's a_dog!  DOG"], 6)[0]
    assert [*ids] == [names[name] for name in CLEANED[clean]] + [0] * (6 - len(CLEANED[clean]))
    pretrained.save(tmp_path / "out", model.config, model.params, model.tokenizer, "open_clip")
    np.testing.assert_array_equal(load(tmp_path / "out").tokenizer.encode(["It's a_dog!  DOG"], 6)[0], ids)


def test_a_separator_that_becomes_padding(tmp_path):
    text = TEXT | {"hf_tokenizer_name": "words", "tokenizer_kwargs": {"strip_sep_token": True}}
    folder = write(tmp_path, text_cfg=text)
    words(folder)
    assert load(folder).tokenizer.encode(["dog dogs", "dog dog dog dog"], 4).tolist() == [[2, 6, 0, 0], [2, 2, 2, 0]]


def test_options_of_tokenizers_that_are_unknown_are_named(tmp_path):
    folder = write(tmp_path, text_cfg=TEXT | {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"language": "de"}})
    words(folder)
    with pytest.raises(UserError, match="tokenizer_kwargs, tokenizer_mode: {'language': 'de'} is not supported"):
        load(folder)
