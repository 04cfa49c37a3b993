"""Encoders as files that jax runs without mmjax: what is in them, what they compute, where they can run."""

import errno
import json
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

import mmjax
from mmjax import api
from mmjax.data import text as tokenizers
from mmjax.data.image_reader import Reader
from mmjax.errors import UserError
from mmjax.models import attention
from tests import programs, test_api_audio
from tests.interop import folders, image_towers, test_bert, test_siglip
from tests.interop.test_clip import settings_with
from tests.test_api_text import IMAGES, TEXTS, config_of
from tests.test_quantization import SHARDED, UNSHARDED, model

export = mmjax.export
# After the lines of the documentation: another file of the same kind, and what was found.
REST = """
text, about = np.load("text.npz"), json.load(open("text.json"))
program = jax.export.deserialize(bytearray(text["program"]))
parameters = {name: text[name] for name in text.files if name != "program"}
np.savez("found.npz", image=embeddings, text=program.call(parameters, np.load("ids.npy")))
import sys
assert not any(name.partition(".")[0] in ("mmjax", "flax") for name in sys.modules)
"""


def documented_lines():
    page = (programs.ROOT / "docs" / "inference.md").read_text()
    (block,) = (found for found in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "deserialize" in found)
    return block


def read(path):
    """The program of a file, and its parameters."""
    file = np.load(path)
    program = jax.export.deserialize(bytearray(file["program"]))
    return program, {name: file[name] for name in file.files if name != "program"}


def call(path, inputs):
    program, parameters = read(path)
    return np.asarray(jax.jit(program.call)(parameters, inputs))


@pytest.fixture(scope="module")
def image_file(tmp_path_factory, openmoji_folder):
    path = tmp_path_factory.mktemp("exported") / "image.npz"
    export.encoder(model(), "image", path)
    return path


def test_a_fresh_process_needs_the_documented_lines_and_jax(image_file, openmoji_folder):
    """Of a picture file, and of ids with eight-bit weights; to a millionth."""
    folder, small = image_file.parent, model(UNSHARDED, "int8")
    picture = Image.fromarray(IMAGES[0]).resize((90, 50))
    picture.save(folder / "cat.jpg")
    export.encoder(small, "text", folder / "text.npz")
    np.save(folder / "ids.npy", small.token_ids(TEXTS))
    code = documented_lines() + REST
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=programs.environment(), check=True)
    found = np.load(folder / "found.npz")
    np.testing.assert_allclose(found["image"], model().encode_image([folder / "cat.jpg"]), atol=1e-6)
    np.testing.assert_allclose(found["text"], small.encode_text(TEXTS), atol=1e-6)
    types = {array.dtype.name for array in read(folder / "text.npz")[1].values()}
    assert types == {"float32", "int8"}


def test_any_batch_size_or_one(image_file, tmp_path):
    expected = model().encode_image([*IMAGES])
    program, _ = read(image_file)
    assert str(program.in_avals[-1].shape) == "(batch, 28, 28, 3)" and program.in_avals[-1].dtype == jnp.uint8
    for rows in (slice(0, 1), slice(1, 5)):
        np.testing.assert_allclose(call(image_file, IMAGES[rows]), expected[rows], atol=1e-6)
    about = export.encoder(model(), "image", tmp_path / "two.npz", batch_size=2)
    assert about["input"]["shape"] == [2, 28, 28, 3] and about["output"]["shape"] == [2, 16]
    np.testing.assert_allclose(call(tmp_path / "two.npz", IMAGES[:2]), expected[:2], atol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        call(tmp_path / "two.npz", IMAGES[:3])


def test_texts_may_be_cut_where_padding_is_ignored(tmp_path, openmoji_folder):
    """To what the longest of them needs; the same embeddings, from less work."""
    one = model()
    ids = one.token_ids(["a dog", "cat"])
    export.encoder(one, "text", tmp_path / "text.npz")
    assert (ids[:, 4:] == 0).all()
    expected = one.encode_text(["a dog", "cat"])
    for length in (4, 8):
        np.testing.assert_allclose(call(tmp_path / "text.npz", ids[:, :length]), expected, atol=1e-6)
    with pytest.raises(ValueError):
        call(tmp_path / "text.npz", np.pad(ids, ((0, 0), (0, 1))))
    config = config_of(everything=False)
    config.model.encoders.text.mask_padding = False
    about = export.encoder(api.Model(config, one.params, None, one.mesh), "text", tmp_path / "whole.npz")
    assert about["input"]["shape"] == ["batch", 8]


@pytest.mark.sharding
def test_a_model_on_eight_devices_becomes_a_program_for_one(image_file, tmp_path):
    export.encoder(model(SHARDED), "image", tmp_path / "image.npz")
    program, parameters = read(tmp_path / "image.npz")
    assert program.nr_devices == 1 and program.platforms == ("cpu", "cuda", "tpu")
    for name, value in read(image_file)[1].items():
        np.testing.assert_array_equal(parameters[name], value)
    np.testing.assert_array_equal(call(tmp_path / "image.npz", IMAGES), call(image_file, IMAGES))


def test_weights_of_sixteen_bits_are_written_as_such(tmp_path, openmoji_folder):
    small = model(UNSHARDED, "bfloat16")
    about = export.encoder(small, "image", tmp_path / "image.npz")
    assert about["weights"] == ["bfloat16", "float32"]
    types = {name: array.dtype.name for name, array in read(tmp_path / "image.npz")[1].items()}
    assert types["image/transformer/blocks/mlp/up/kernel"] == "uint16"  # NumPy's files have no name for theirs
    assert types["image/transformer/blocks/mlp/up/bias"] == "float32"
    np.testing.assert_allclose(call(tmp_path / "image.npz", IMAGES), small.encode_image([*IMAGES]), atol=1e-6)


def test_a_host_with_a_gpu_exports_for_others_too(tmp_path, monkeypatch, openmoji_folder):
    """No implementation of attention that only this host's device has."""
    config = config_of(everything=False)
    config.model.encoders.image.heads = 4
    query = jnp.zeros((1, 4, 4, 8), jnp.bfloat16)
    wide = api.Model(config, model().params, None, model().mesh)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert attention.implementation(query, query, None) == "cudnn"
        export.encoder(wide, "image", tmp_path / "image.npz", ("cpu", "cuda"), compute="bfloat16")
        assert attention.implementation(query, query, None) == "cudnn"
    found, expected = call(tmp_path / "image.npz", IMAGES), wide.encode_image([*IMAGES])
    assert (found * expected).sum(axis=1).min() > 0.999 and np.abs(found - expected).max() > 1e-4


@pytest.mark.parametrize(
    "platforms, setting, asked, expected",
    [
        (("cuda", "tpu"), "auto", "auto", "bfloat16"),
        (("cuda", "cpu"), "auto", "auto", "float32"),
        (("cpu",), "bfloat16", "auto", "bfloat16"),
        (("tpu",), "auto", "float32", "float32"),
    ],
)
def test_what_it_computes_in(tmp_path, platforms, setting, asked, expected, openmoji_folder):
    config = config_of(everything=False)
    config.precision.compute = setting
    one = api.Model(config, model().params, None, model().mesh)
    about = export.encoder(one, "text", tmp_path / "text.npz", platforms, compute=asked)
    program, _ = read(tmp_path / "text.npz")
    assert about["compute"] == expected and ("bf16" in program.mlir_module()) == (expected == "bfloat16")
    assert program.platforms == platforms and program.out_avals[0].dtype == jnp.float32


def test_the_other_file_says_what_the_user_has_to_know(image_file, tmp_path, openmoji_folder):
    about = json.loads(image_file.with_suffix(".json").read_text())
    assert about["input"] == {"shape": ["batch", 28, 28, 3], "dtype": "uint8"}
    assert about["output"] == {"shape": ["batch", 16], "dtype": "float32", "norm": 1}
    assert about["reading"]["resize"] == "squash" and about["modality"] == "image"
    assert about["parameter_bytes"] == sum(array.nbytes for array in read(image_file)[1].values())
    written = export.encoder(model(), "text", tmp_path / "text.npz")
    about = json.loads((tmp_path / "text.json").read_text())
    assert about == written and about["input"] == {"shape": ["batch", "length"], "dtype": "int32"}
    tokenizer = tokenizers.from_json(about["reading"]["tokenizer"])
    np.testing.assert_array_equal(tokenizer.encode(TEXTS, about["reading"]["length"]), model().token_ids(TEXTS))
    scaled = (
        about["similarity"]["logit_scale"]
        * call(image_file, IMAGES)
        @ call(tmp_path / "text.npz", model().token_ids(TEXTS)).T
    )
    assert about["similarity"]["loss"] == "sigmoid"
    probabilities = 1 / (1 + np.exp(-scaled - about["similarity"]["logit_bias"]))
    expected = model().similarity(model().encode_image([*IMAGES]), model().encode_text(TEXTS))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modality": "imgae"}, 'modality: unknown "imgae"; did you mean "image"?'),
        ({"path": "model.onnx"}, "model.onnx: the file to write has to be a local one that ends in .npz"),
        ({"path": "gs://bucket/image.npz"}, "gs://bucket/image.npz: the file to write has to be a local one"),
        ({"path": "nowhere/image.npz"}, "cannot write nowhere/image.npz: there is no folder nowhere"),
        ({"platforms": ("gpu",)}, 'platforms: unknown "gpu"'),
        ({"platforms": ("cpu", "cpu")}, "platforms: cpu,cpu: name one or more, each once"),
        ({"platforms": ()}, "platforms: none: name one or more"),
        ({"batch_size": 0}, "batch_size: 0 is not positive"),
        ({"compute": "flaot32"}, 'compute: unknown type "flaot32"; did you mean "float32"?'),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, change, message, openmoji_folder):
    monkeypatch.chdir(tmp_path)
    arguments = {"modality": "image", "path": "image.npz"} | change
    with pytest.raises(UserError, match=re.escape(message)):
        export.encoder(model(), **arguments)
    assert not [*tmp_path.iterdir()]


def test_a_model_without_that_encoder_says_so(tmp_path, openmoji_folder):
    config = config_of(everything=False)
    config.objectives = {}
    config.model.parts = ("text",)
    with pytest.raises(UserError, match="cannot encode an input of the modality image"):
        export.encoder(api.Model(config, model().params, None, model().mesh), "image", tmp_path / "image.npz")


def test_recordings(tmp_path):
    one = test_api_audio.towers()
    about = export.encoder(one, "audio", tmp_path / "audio.npz")
    assert about["input"] == {"shape": ["batch", 1600], "dtype": "float32"} and about["reading"]["sample_rate"] == 1600
    recordings = [test_api_audio.recording(number, 1.0) for number in range(3)]
    found = call(tmp_path / "audio.npz", np.stack(recordings))
    np.testing.assert_allclose(found, one.encode_audio(recordings), atol=1e-6)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, openmoji_folder):
    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "image.npz").write_bytes(b"before")
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(UserError, match="image.npz: No space left on device"):
        export.encoder(model(), "image", tmp_path / "image.npz")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("family", ["siglip2", "bert", "beit"])
def test_families_with_their_own_inputs_and_parts(tmp_path, family):
    """Images that keep their shape, texts alone, relative positions; with eight-bit weights."""
    if family == "siglip2":
        settings = {"model_type": family, **test_siglip.SETTINGS[family]}
        folder = folders.write(tmp_path, family, settings, preprocessor_config=test_siglip.PROCESSORS[family])
    elif family == "bert":
        folder = folders.write(tmp_path, family, test_bert.SETTINGS)
    else:
        folder = image_towers.CASES["beit layers"].write(tmp_path)
    one, modality = api.load(folder, weights="int8"), "text" if family == "bert" else "image"
    rows = test_bert.ids() if modality == "text" else one._loader([*folders.pixels(3, 20)])(np.arange(3))
    expected = one.encode_rows(modality, 3, lambda places: jax.tree.map(lambda x: x[places], rows))
    about = export.encoder(one, modality, tmp_path / "encoder.npz")
    np.testing.assert_allclose(call(tmp_path / "encoder.npz", rows), expected, atol=1e-6)
    described = jax.tree.map(lambda x: {"shape": ["batch", *x.shape[1:]], "dtype": x.dtype.name}, rows)
    if family == "bert":
        described["shape"][1] = "length"
    assert about["input"] == described and ("similarity" in about) == (family == "siglip2")
    if modality == "image":
        again = Reader(**about["reading"])(folders.pixels(3, 20))
        jax.tree.map(np.testing.assert_array_equal, again, rows)


def test_the_program(tmp_path):
    source = folders.write(tmp_path / "clip", "clip", settings_with("gelu"))
    arguments = [f"--model={source}", "--modality=text", f"--out={tmp_path / 'text.npz'}"]
    code, output = programs.run("export", *arguments, "--weights=int8", "--platforms=cpu,tpu", devices=2)
    line = f"{tmp_path / 'text.npz'}: int32 [batch, length] -> float32 [batch, 8], 0.0 MB of parameters, for cpu, tpu\n"
    assert code == 0 and output.endswith(line), output
    ids = np.array([[38, 5, 7, 39, 39, 39]], np.int32)
    loaded = api.load(source, weights="int8")
    expected = loaded.encode_rows("text", 1, lambda rows: ids[rows])
    np.testing.assert_allclose(call(tmp_path / "text.npz", ids), expected, atol=1e-6)
    assert json.loads((tmp_path / "text.json").read_text())["reading"]["tokenizer"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--model is missing; for a start: --model=runs/quickstart --modality=image --out=image.npz"),
        (("--model=a", "--modality=image", "--out=image.onnx"), "image.onnx: the file to write has to be"),
        (("--model=a", "--modality=image", "--out=x.npz", "--platfroms=cpu"), 'did you mean "platforms"?'),
        (("--model=a", "--modality=image", "--out=x.npz"), "a is no workdir of a run"),
        (("--model=a", "--modality=image", "--out=x.npz", "--weights=int4"), 'did you mean "int8"?'),
    ],
)
def test_the_programs_mistakes_are_one_line(arguments, message):
    code, output = programs.run("export", *arguments)
    assert code == 2 and message in output and len(output.strip().splitlines()) == 1, output


def test_help_explains_the_program_and_importing_it_defines_no_flags():
    code, output = programs.run("export", "--help")
    assert code == 0 and "python -m mmjax.export" in output and "--platforms: where it can run" in output
    assert "platforms" not in flags.FLAGS
