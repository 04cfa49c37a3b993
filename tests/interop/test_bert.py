"""BERT and folders of sentence-transformers: the results of transformers that make_goldens_bert.py stored."""

import json
import shutil

import numpy as np
import pytest

from mmjax import api
from mmjax.errors import UserError
from mmjax.interop import pretrained, store
from tests.interop import bert_tokenizer, folders

SETTINGS = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 440,
    "max_position_embeddings": 12,
}
MASKED = SETTINGS | {"architectures": ["BertForMaskedLM"]}
MODULES = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
TEXTS = ("a [MASK] fox", "[MASK] dog, and a [MASK]")


def sentence_files(mode="mean_tokens", **others):
    pooling = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
    files = {"modules": MODULES, "1_Pooling/config": pooling, "sentence_bert_config": {"max_seq_length": 8}}
    return files | others


def ids():
    rows = np.random.default_rng(3).integers(5, 440, (3, 12)).astype(np.int32)
    rows[1, 4:], rows[2, 1:] = 0, 0
    return rows


def encoded(model, method="features_rows"):
    rows = ids()
    return getattr(model, method)("text", 3, lambda places: rows[places], batch_size=3)


@pytest.fixture
def wanted():
    return np.load(folders.GOLDENS / "bert.npz")


def test_pooled_texts_are_those_of_transformers(wanted, tmp_path):
    model = api.load(folders.write(tmp_path, "bert", SETTINGS))
    assert folders.relative_error(encoded(model), wanted["pooled"]) < 1e-4
    unit = wanted["pooled"] / np.linalg.norm(wanted["pooled"], axis=1, keepdims=True)
    assert folders.relative_error(encoded(model, "encode_rows"), unit) < 1e-4


@pytest.mark.parametrize(("mode", "golden"), [("mean_tokens", "mean"), ("cls_token", "first")])
def test_sentences_are_those_of_sentence_transformers(mode, golden, wanted, tmp_path):
    folder = folders.write(tmp_path / "in", "bert", SETTINGS, **sentence_files(mode))
    model = api.load(folder)
    assert folders.relative_error(encoded(model), wanted[golden]) < 1e-4
    assert model.config.model.encoders.text.length == 8 and model.config.model.encoders.text.positions == 12
    pretrained.save(tmp_path / "out", model.config, model.params, None)
    folders.assert_same_tensors(folder, tmp_path / "out")
    assert api.load(tmp_path / "out").config.to_dict() == model.config.to_dict()


def test_the_newer_form_of_the_pooling_settings(tmp_path):
    files = sentence_files() | {"1_Pooling/config": {"pooling_mode": "cls", "include_prompt": True}}
    assert api.load(folders.write(tmp_path, "bert", SETTINGS, **files)).config.model.encoders.text.pooling == "cls"


def test_hidden_tokens_are_those_of_transformers(wanted, tmp_path):
    folder = folders.write(tmp_path, "bert", MASKED)
    bert_tokenizer.write(folder)
    model = api.load(folder)
    found = model.fill_mask(TEXTS, top_k=3)
    assert [len(of_text) for of_text in found] == [1, 2]
    flat = [candidates for of_text in found for candidates in of_text]
    tokens = [model.tokenizer.decode([index]) for index in wanted["likeliest"].ravel()]
    assert [token for candidates in flat for token, _ in candidates] == tokens
    np.testing.assert_allclose([[p for _, p in each] for each in flat], wanted["probabilities"], rtol=1e-4)
    alone = model.fill_mask(TEXTS[1], top_k=1)
    assert [[token for token, _ in each] for each in alone] == [[each[0][0]] for each in found[1]]


def test_a_text_has_to_hide_something(tmp_path):
    folder = folders.write(tmp_path / "masked", "bert", MASKED)
    bert_tokenizer.write(folder)
    model = api.load(folder)
    with pytest.raises(UserError, match="'a fox' has no mask token within the 12 tokens"):
        model.fill_mask(["[MASK]", "a fox"])
    with pytest.raises(UserError, match="top_k: 0"):
        model.fill_mask("[MASK]", top_k=0)
    with pytest.raises(UserError, match="1 images and 2 texts are no pairs"):
        model.fill_mask(["[MASK]"] * 2, images=[np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(UserError, match="cannot read images"):
        model.fill_mask("[MASK]", images=[np.zeros((4, 4, 3), np.uint8)])
    plain = api.load(folders.write(tmp_path / "plain", "bert", SETTINGS))
    with pytest.raises(UserError, match="cannot fill in hidden tokens"):
        plain.fill_mask("[MASK]")


def test_a_model_of_texts_reads_no_images(tmp_path):
    model = api.load(folders.write(tmp_path, "bert", SETTINGS))
    with pytest.raises(UserError, match="cannot read images"):
        model.encode_image([np.zeros((4, 4, 3), np.uint8)])


def rewritten(folder, change):
    """The folder with its tensors by their changed names; None leaves one out."""
    tensors = {change(name): value for name, value in folders.tensors_of(folder).items()}
    (folder / "model.safetensors").unlink()
    store.save_tensors(folder / "model.safetensors", {name: value for name, value in tensors.items() if name})
    return folder


def test_names_of_older_checkpoints_mean_the_same(wanted, tmp_path):
    def older(name):
        return "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    model = api.load(rewritten(folders.write(tmp_path, "bert", SETTINGS), older))
    assert folders.relative_error(encoded(model), wanted["pooled"]) < 1e-4


def test_a_tensor_by_both_its_names_is_refused(tmp_path):
    folder = folders.write(tmp_path, "bert", SETTINGS)
    tensors = folders.tensors_of(folder)
    (folder / "model.safetensors").unlink()
    store.save_tensors(folder / "model.safetensors", tensors | {"bert.pooler.dense.bias": tensors["pooler.dense.bias"]})
    with pytest.raises(UserError, match=r"there by another name, too: (bert\.)?pooler\.dense\.bias$"):
        api.load(folder)


def test_without_a_pooler_texts_are_the_mean_of_their_tokens(wanted, tmp_path):
    folder = folders.write(tmp_path, "bert", SETTINGS)
    model = api.load(rewritten(folder, lambda name: None if name.startswith("pooler") else name))
    assert folders.relative_error(encoded(model), wanted["mean"]) < 1e-4


def test_a_pooler_beside_the_head_is_kept(tmp_path):
    """As in the checkpoints that were published first."""
    folder = folders.write(tmp_path / "in", "bert", MASKED | {"architectures": ["BertForPreTraining"]})
    settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    model = api.load(folder)
    assert model.config.model.encoders.text.pool_dense
    pretrained.save(tmp_path / "out", model.config, model.params, None)
    folders.assert_same_tensors(folder, tmp_path / "out")


def with_head(folder, words):
    tensors = folders.tensors_of(folder)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + words
    (folder / "model.safetensors").unlink()
    store.save_tensors(folder / "model.safetensors", tensors)
    return folder


def test_a_head_of_its_own_is_refused_and_a_tied_one_is_not(tmp_path):
    folder = folders.write(tmp_path / "tied", "bert", MASKED)
    shutil.copytree(folder, tmp_path / "own")
    assert api.load(with_head(folder, np.float32(0))).params
    message = r"cls\.predictions\.decoder\.weight is not equal to bert\.embeddings\.word_embeddings\.weight"
    with pytest.raises(UserError, match=message):
        api.load(with_head(tmp_path / "own", np.float32(1e-3)))


REFUSED = {
    "another head": ({"architectures": ["BertForTokenClassification"]}, {}, "BertForTokenClassification is none of"),
    "positions": ({"position_embedding_type": "relative_key"}, {}, "position_embedding_type is 'relative_key'"),
    "a decoder": ({"is_decoder": True}, {}, "is_decoder is True, and a model here has False"),
    "max": ({}, sentence_files("max_tokens"), "pooled by max_tokens, neither cls nor mean"),
    "both": (
        {},
        sentence_files() | {"1_Pooling/config": {"pooling_mode": ["cls", "mean"]}},
        "pooled by cls and mean, neither cls nor mean",
    ),
    "dense": ({}, sentence_files(modules=[*MODULES[:2], {"type": "x.Dense"}]), "Dense are not Transformer, Pooling"),
    "prompt": (
        {},
        sentence_files(config_sentence_transformers={"default_prompt_name": "query"}),
        "default_prompt_name puts a prompt",
    ),
    "case": (
        {},
        sentence_files(sentence_bert_config={"do_lower_case": True}),
        "do_lower_case is on, and the tokenizer keeps capitals",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_here_does_not_do_is_refused(name, tmp_path):
    settings, files, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        folders.write(tmp_path, "bert", SETTINGS | settings, **files)
