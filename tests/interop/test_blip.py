"""BLIP: the results of transformers that make_goldens_blip.py stored."""

import json

import numpy as np
import pytest

from mmjax import api
from mmjax.errors import UserError
from mmjax.interop import pretrained
from mmjax.validation import validate
from tests.interop import bert_tokenizer, folders

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
SETTINGS = {
    "model_type": "blip",
    "image_text_hidden_size": 12,
    "text_config": TOWER | {"vocab_size": 440, "max_position_embeddings": 24, "bos_token_id": 438, "sep_token_id": 3},
    "vision_config": TOWER | {"hidden_size": 24, "image_size": 8, "patch_size": 4},
}
CAPTIONS = SETTINGS | {"architectures": ["BlipForConditionalGeneration"]}
RETRIEVAL = SETTINGS | {"architectures": ["BlipForImageTextRetrieval"]}
TEXTS = ("a red fox", "the lazy dog", "!")
PROMPT = "a red"


def pixels():
    return folders.pixels(3, 8)


@pytest.fixture
def wanted():
    return np.load(folders.GOLDENS / "blip.npz")


@pytest.fixture
def load(tmp_path):
    def load(settings):
        folder = folders.write(tmp_path / settings["architectures"][0], "blip", settings)
        bert_tokenizer.write(folder)
        return api.load(folder)

    return load


def test_matching_and_embeddings_are_those_of_transformers(load, wanted):
    model = load(RETRIEVAL)
    image, text = model.encode_image(pixels()), model.encode_text(TEXTS)
    np.testing.assert_allclose(image @ text.T, wanted["cosines"], atol=1e-5)
    assert folders.relative_error(model.match(pixels(), TEXTS), wanted["matches"]) < 1e-4
    assert folders.relative_error(model.similarity(image, text).sum(axis=1), np.ones(3)) < 1e-6


def test_a_tower_that_reads_images_is_held_once(load):
    model = load(RETRIEVAL)
    blocks = model.params["text"]["transformer"]["blocks"]
    assert blocks["cross_attention"]["key"]["kernel"].shape == (2, 24, 16)
    assert set(model.params["fusion"]) == {"match_head"}


def test_captions_are_those_of_transformers(load, wanted):
    model = load(CAPTIONS)
    decoded = {name: [model.tokenizer.decode(row[1:]) for row in wanted[name]] for name in ("written", "continued")}
    assert model.caption(pixels()) == decoded["written"]
    assert model.caption(pixels(), [PROMPT] * 3, max_new_tokens=5) == decoded["continued"]
    assert wanted["written"].shape[1] == 21, "as many tokens as transformers writes by itself"
    assert all(text.startswith(PROMPT) for text in decoded["continued"])


def test_more_tokens_can_be_asked_for(load):
    model = load(CAPTIONS)
    shorter, longer = (model.caption(pixels(), max_new_tokens=count) for count in (3, 60))
    assert all(len(one) < len(other) for one, other in zip(shorter, longer, strict=True))
    with pytest.raises(UserError, match="max_new_tokens: -1 is less than 0"):
        model.caption(pixels(), max_new_tokens=-1)


@pytest.mark.parametrize("settings", [CAPTIONS, RETRIEVAL], ids=["captions", "retrieval"])
def test_the_export_has_the_same_bits(settings, load, tmp_path):
    model = load(settings)
    assert pretrained.save(tmp_path / "out", model.config, model.params, model.tokenizer) == "blip"
    folders.assert_same_tensors(tmp_path / settings["architectures"][0], tmp_path / "out")
    again = api.load(tmp_path / "out")
    assert again.config.to_dict() == model.config.to_dict()
    np.testing.assert_array_equal(again.token_ids(TEXTS), model.token_ids(TEXTS))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["bos_token_id"] == 438 and written["text_config"]["sep_token_id"] == 3


@pytest.mark.parametrize("kind", ["BlipModel", "BlipForQuestionAnswering"])
def test_other_models_of_blip_are_refused(kind, tmp_path):
    with pytest.raises(UserError, match=f"and this is a {kind}"):
        folders.write(tmp_path, "blip", SETTINGS | {"architectures": [kind]})


def test_a_model_that_blip_has_not_is_refused(load, tmp_path):
    model = load(RETRIEVAL)
    del model.config.objectives["matching"]
    with pytest.raises(UserError, match="no model of the family blip: it consists of image, text"):
        pretrained.save(tmp_path / "out", model.config, model.params, None, "blip")


WRONG = {
    "fusion": ({"depth": 2, "reads": "tower"}, "model.fusion.depth: with reads=tower the layers are the text tower's"),
    "decoder": ({"start_id": 4}, "model.decoder.start_id: it needs reads=embedding, and start off"),
}


@pytest.mark.parametrize("part", WRONG)
def test_settings_that_go_together(part, load):
    from mmjax import config as configs

    fields, message = WRONG[part]
    config = load(RETRIEVAL).config
    config.streams.train = configs.stream(batch_size=8)
    config.train.steps = 1
    validate(config, 1)
    config.model[part] = {"fusion": configs.fusion, "decoder": configs.decoder}[part](**fields)
    with pytest.raises(UserError, match=message):
        validate(config, 1)
