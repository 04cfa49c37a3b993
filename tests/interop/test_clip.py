"""CLIP: the results of transformers that make_goldens_clip.py stored."""

import numpy as np
import pytest

from mmjax import api
from mmjax.errors import UserError
from tests.interop import folders

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


def settings_with(activation):
    tower = TOWER | {"hidden_act": activation}
    return {
        "model_type": "clip",
        "projection_dim": 8,
        "text_config": tower | {"vocab_size": 40, "max_position_embeddings": 6, "eos_token_id": 39, "bos_token_id": 38},
        "vision_config": tower | {"image_size": 8, "patch_size": 4},
    }


def pixels():
    return folders.pixels(3, 8)


def ids():
    return np.array([[38, 5, 7, 39, 39, 39], [38, 1, 2, 3, 4, 39], [38, 39, 0, 0, 0, 0]], np.int32)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_are_those_of_transformers(activation, tmp_path):
    wanted = np.load(folders.GOLDENS / "clip.npz")
    model = api.load(folders.write(tmp_path, "clip", settings_with(activation)))
    image = model.encode_rows("image", 3, lambda rows: pixels()[rows])
    text = model.encode_rows("text", 3, lambda rows: ids()[rows])
    assert folders.relative_error(image, wanted[f"{activation}_image"]) < 1e-4
    assert folders.relative_error(text, wanted[f"{activation}_text"]) < 1e-4
    np.testing.assert_allclose(model.similarity(image, text), wanted[f"{activation}_probabilities"], atol=1e-5)


def test_the_old_end_token_is_the_last_of_the_vocabulary(tmp_path):
    settings = settings_with("gelu")
    settings["text_config"]["eos_token_id"] = 2
    assert api.load(folders.write(tmp_path, "clip", settings)).config.model.encoders.text.end_id == 39


def test_an_activation_that_is_unknown_is_named(tmp_path):
    with pytest.raises(UserError, match="hidden_act 'relu' is none of quick_gelu, gelu"):
        folders.write(tmp_path, "clip", settings_with("relu"))


def test_a_folder_that_does_not_say_how_images_are_prepared_is_warned_of(tmp_path, recwarn):
    whole, part = tmp_path / "whole", tmp_path / "part"
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 8}, "crop_size": 8}
    folders.write(whole, "clip", settings_with("gelu"), preprocessor_config=processor)
    assert api.load(whole).config.model.encoders.image.mean == (0.5, 0.5, 0.5)
    assert not [each for each in recwarn if "preprocessor_config" in str(each.message)]
    folders.write(part, "clip", settings_with("gelu"))
    with pytest.warns(UserWarning, match="part has no preprocessor_config.json: what it encodes is prepared as for mo"):
        assert api.load(part).config.model.encoders.image.mean != (0.5, 0.5, 0.5)
