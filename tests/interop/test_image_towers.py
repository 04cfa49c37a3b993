"""ViT, BEiT and DINOv2: the results of transformers that make_goldens_image_towers.py stored."""

import json

import numpy as np
import pytest
from PIL import Image

from mmjax import api, explain
from mmjax.errors import UserError
from mmjax.interop import pretrained
from mmjax.sharding.mesh import make_mesh
from tests.interop import folders, image_towers
from tests.interop.image_towers import BEIT, CASES, CLASSES, DINOV2, SIZE, TOWER


def assert_as_stored(model, name):
    """Within 1e-5: these weights are small, and so is what a bias of attention changes."""
    wanted = np.load(folders.GOLDENS / "image_towers.npz")
    outputs = image_towers.ours(model, folders.pixels(3, SIZE))
    stored = [key for key in outputs if f"{name} {key}" in wanted]
    assert stored
    for key in stored:
        assert folders.relative_error(outputs[key], wanted[f"{name} {key}"]) < 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers_and_an_export_has_the_same_bits(name, tmp_path):
    model = api.load(CASES[name].write(tmp_path / "theirs"))
    assert_as_stored(model, name)
    assert pretrained.save(tmp_path / "ours", model.config, model.params, None) == CASES[name].family
    folders.assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert api.load(tmp_path / "ours").config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("name", ["beit shared", "beit layers", "dinov2 gated", "vit classifier"])
def test_outputs_are_the_same_on_a_mesh(name, tmp_path):
    assert_as_stored(api.load(CASES[name].write(tmp_path), mesh=make_mesh(2, 2, 2)), name)


def test_weights_of_eight_bits_are_near(tmp_path):
    folder, pixels = CASES["beit shared"].write(tmp_path), folders.pixels(3, SIZE)
    exact, small = (image_towers.ours(api.load(folder, weights=kind), pixels) for kind in ("float32", "int8"))
    for key, value in exact.items():
        assert 0 < folders.relative_error(small[key], value) < 0.05


def test_classes_are_named_by_their_probability(tmp_path):
    model, images = api.load(CASES["vit classifier"].write(tmp_path)), [*folders.pixels(3, 30)]
    logits = model.classify_rows(3, model._loader(images))
    found = model.classify(images, top_k=2)
    for row, best in zip(logits, found, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-probabilities)[:2]
        assert [label for label, _ in best] == [f"class {index}" for index in order]
        np.testing.assert_allclose([probability for _, probability in best], probabilities[order], rtol=1e-5)
    assert len(model.classify(images[:1], top_k=99)[0]) == 5 and model.classify([]) == []
    one = model.classify(Image.fromarray(images[0]), top_k=2)
    assert [label for label, _ in one] == [label for label, _ in found[0]]


def test_what_a_model_has_not_is_refused(tmp_path):
    tower = api.load(CASES["vit"].write(tmp_path / "vit"))
    with pytest.raises(UserError, match="cannot classify images"):
        tower.classify([*folders.pixels(1, SIZE)])
    with pytest.raises(UserError, match="cannot predict the visual tokens"):
        tower.predict_image_tokens([*folders.pixels(1, SIZE)], np.zeros((1, 16), bool))
    beit = api.load(CASES["beit shared"].write(tmp_path / "beit"))
    with pytest.raises(UserError, match=r"masked has the shape \[1, 9\], and not \[1, 16\]"):
        beit.predict_image_tokens([*folders.pixels(1, SIZE)], np.zeros((1, 9), bool))


def test_hidden_patches_are_not_seen(tmp_path):
    model = api.load(CASES["beit shared"].write(tmp_path))
    first, second = folders.pixels(1, SIZE), folders.pixels(1, SIZE, seed=1)
    hidden = np.zeros((1, 16), bool)
    hidden[0, :4] = True  # the first row of patches
    second[:, 4:] = first[:, 4:]
    same = [model.predict_image_tokens([*images], hidden) for images in (first, second)]
    np.testing.assert_array_equal(*same)
    assert np.abs(model.predict_image_tokens([*second], ~hidden) - same[0]).max() > 1e-3


def test_attention_with_a_bias_can_be_explained_and_other_sizes_are_refused(tmp_path):
    model, images = api.load(CASES["beit layers"].write(tmp_path)), [*folders.pixels(2, SIZE)]
    heats = explain.rollout(model, "image", images)
    assert [heat.shape for heat in heats] == [(4, 4)] * 2 and 0.5 < heats[0].sum() < 1
    with pytest.raises(UserError, match="an image of 16x32 pixels: relative positions are those of 16x16"):
        explain.rollout(model, "image", [folders.pixels(1, 32)[0, :16]], keep_shape=True)


MISTAKES = [
    ("vit", TOWER | {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling predicts pixels"),
    ("vit", TOWER | {"qkv_bias": False}, "qkv_bias is False, and a model here can have True alone"),
    ("vit", TOWER | {"num_channels": 4}, "num_channels is 4"),
    ("vit", TOWER | {"pooler_output_size": 8}, "pooler_output_size is 8, and a model here can have 16 alone"),
    ("vit", TOWER | {"image_size": [16, 20]}, "is no square"),
    (
        "vit",
        TOWER | CLASSES | {"architectures": ["ViTForImageClassification"], "problem_type": "regression"},
        "problem_type is regression",
    ),
    ("beit", BEIT | {"architectures": ["BeitForSemanticSegmentation"]}, "BeitForSemanticSegmentation labels pixels"),
    (
        "beit",
        BEIT | {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
        "either those of each layer or shared",
    ),
    ("beit", BEIT | {"architectures": ["BeitForMaskedImageModeling"]}, "use_mask_token is False"),
    ("dinov2", DINOV2 | {"hidden_act": "relu"}, "hidden_act 'relu' is none of"),
]


@pytest.mark.parametrize(("family", "settings", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_what_is_no_such_model_is_named(family, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        folders.write(tmp_path, family, settings)


@pytest.mark.parametrize(
    "content",
    [
        *(5, None, [], {"model_type": ["vit"]}, {"model_type": {}}),
        *({"num_attention_heads": 3}, {"patch_size": 64}, {"hidden_size": -16}, {"num_hidden_layers": "2"}),
        {"layer_norm_eps": "1e-6"},
    ],
    ids=str,
)
def test_a_spoiled_config_is_told_in_one_line(content, tmp_path):
    path = folders.write(tmp_path / "model", "vit", TOWER) / "config.json"
    path.write_text(json.dumps(TOWER | content if isinstance(content, dict) and content else content))
    with pytest.raises(UserError) as error:
        api.load(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_a_pooler_is_known_by_its_tensors(tmp_path):
    folder = CASES["vit"].write(tmp_path / "with")
    tensors = {name: value for name, value in folders.tensors_of(folder).items() if not name.startswith("pooler")}
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    pretrained.store.save_tensors(folder / "model.safetensors", tensors)
    model = api.load(folder)
    assert not model.config.model.encoders.image.pool_dense
    pretrained.save(tmp_path / "without", model.config, model.params, None)
    folders.assert_same_tensors(folder, tmp_path / "without")


def test_an_mlp_of_a_width_that_dinov2_cannot_have_is_named(tmp_path):
    model = api.load(CASES["dinov2"].write(tmp_path / "theirs"))
    model.config.model.encoders.image.mlp_dim = 60
    with pytest.raises(UserError, match="its MLPs are 60 wide, for a width of 16"):
        pretrained.save(tmp_path / "ours", model.config, model.params, None, "dinov2")


def test_labels_come_in_the_order_of_their_numbers(tmp_path):
    labels = {str(index): f"class {index}" for index in (10, 9, 2, *range(2), *range(3, 9))}
    settings = TOWER | {"id2label": labels, "architectures": ["ViTForImageClassification"], "model_type": "vit"}
    folder = folders.write(tmp_path, "vit", settings)
    assert api.load(folder).config.model.classifier.labels == tuple(f"class {index}" for index in range(11))
    assert "label2id" not in json.loads((folder / "config.json").read_text())
