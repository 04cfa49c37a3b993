"""Parameter tables: strict in every direction, and the same numbers on every mesh."""

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.errors import UserError
from mmjax.interop import pretrained, store
from mmjax.interop.table import SAME, Row, Table, expected
from mmjax.sharding.mesh import make_mesh
from tests.interop import folders

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
SETTINGS = {
    "model_type": "clip",
    "projection_dim": 8,
    "text_config": TOWER | {"vocab_size": 40, "max_position_embeddings": 6, "eos_token_id": 39},
    "vision_config": TOWER | {"image_size": 8, "patch_size": 4},
}
LAYER = "text_model.encoder.layers.1"


@pytest.fixture
def folder(tmp_path):
    return folders.write(tmp_path / "clip", "clip", SETTINGS)


def changed(folder, change):
    tensors = folders.tensors_of(folder)
    change(tensors)
    (folder / "model.safetensors").unlink()
    store.save_tensors(folder / "model.safetensors", tensors)
    return folder


def renamed(tensors):
    tensors[f"{LAYER}.mlp.fc9.bias"] = tensors.pop(f"{LAYER}.mlp.fc1.bias")


def transposed(tensors):
    tensors[f"{LAYER}.mlp.fc1.weight"] = np.ascontiguousarray(tensors[f"{LAYER}.mlp.fc1.weight"].T)


def damaged(tensors):
    tensors[f"{LAYER}.mlp.fc1.weight"][3, 5] = np.nan


CHANGES = {
    "missing": (lambda tensors: tensors.pop(f"{LAYER}.mlp.fc1.bias"), rf"missing: {LAYER}\.mlp\.fc1\.bias$"),
    "extra": (lambda tensors: tensors.update(head=np.ones(2, np.float32)), r"unknown: head$"),
    "renamed": (renamed, rf"missing: {LAYER}\.mlp\.fc1\.bias; unknown: {LAYER}\.mlp\.fc9\.bias$"),
    "transposed": (transposed, rf"of another shape: {LAYER}\.mlp\.fc1\.weight \(\[16, 24\] instead of \[24, 16\]\)$"),
    "damaged": (damaged, rf"{LAYER}\.mlp\.fc1\.weight holds a value that is not finite"),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_tensor_that_is_not_as_it_should_be_is_named(fault, folder):
    change, message = CHANGES[fault]
    with pytest.raises(UserError, match=message) as refusal:
        api.load(changed(folder, change))
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_holds_no_parameter_is_passed_over(folder):
    changed(
        folder, lambda tensors: tensors.update({"text_model.embeddings.position_ids": np.zeros((1, 6), np.float32)})
    )
    assert api.load(folder).params


def test_parameters_are_the_same_on_every_mesh(folder):
    one = api.load(folder, mesh=make_mesh(devices=jax.devices()[:1]))
    many = api.load(folder, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
    kernel = many.params["text"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_data(0).shape == (2, 8, 12) and kernel.shape == (2, 16, 24)


def test_the_export_has_the_same_bits(folder, tmp_path):
    model = api.load(folder)
    assert pretrained.save(tmp_path / "out", model.config, model.params, model.tokenizer) == "clip"
    folders.assert_same_tensors(folder, tmp_path / "out")
    again = api.load(tmp_path / "out")
    assert again.config.to_dict() == model.config.to_dict()


def test_a_model_that_the_family_has_not_is_refused(folder, tmp_path):
    model = api.load(folder)
    model.config.model.encoders.text.causal = False
    with pytest.raises(
        UserError, match=r"no model of the family clip: model.encoders.text.causal is False and not True"
    ):
        pretrained.save(tmp_path / "out", model.config, model.params, None, "clip")
    with pytest.raises(UserError, match='unknown family "?.clop.*did you mean "clip"'):
        pretrained.save(tmp_path / "out", model.config, model.params, None, "clop")


def test_a_table_has_each_parameter_once():
    shapes = {"a": jax.ShapeDtypeStruct((2,), np.float32), "b": jax.ShapeDtypeStruct((), np.float32)}
    assert expected(Table((Row("a", "x", SAME, (0, 2)), Row("b", "y"))), shapes) == {"x": (4,), "y": ()}
    with pytest.raises(ValueError, match=r"\['b'\]"):
        expected(Table((Row("a", "x"),)), shapes)
    with pytest.raises(ValueError, match=r"\['a'\]"):
        expected(Table((Row("a", "x"), Row("a", "y")), {"b": 0.0}), shapes)


def test_an_unknown_family_is_named(folder):
    (folder / "config.json").write_text('{"model_type": "clap"}')
    with pytest.raises(UserError, match="config.json is of a 'clap' model"):
        api.load(folder)
