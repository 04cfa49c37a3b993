"""Calls with any numbers and lengths of inputs run few compiled programs, and give what one input alone gives."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.data import sources, text
from mmjax.sharding.mesh import make_mesh
from tests import tiny

WORDS = ["red", "woman", "running", "the", "flag", "of", "a", "dog", "medium", "dark", "skin", "tone"]
TEXTS = [" ".join(WORDS[: 1 + index % len(WORDS)]) for index in range(40)]


def make(**encoder):
    config = tiny.get_config()
    config.model.encoders.text.update({"length": 32} | encoder)
    with jax.set_mesh(mesh := make_mesh(devices=jax.devices()[:1])):
        params = jax.jit(lambda: api.init_params(config, api.make_module(config)))()
    return api.Model(config, params, text.load(sources.tokenizer_path("openmoji:en", ())), mesh)


TOWERS = {
    "mean": {},
    "eos": {"pooling": "eos", "causal": True, "mask_padding": False},
    "last": {"pooling": "last", "mask_padding": False},
    "unmasked": {"pooling": "mean", "mask_padding": False},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_texts_of_any_number_and_length(tower, openmoji_folder):
    model = make(**TOWERS[tower])
    whole = model.encode_rows("text", 40, lambda rows: model.token_ids(TEXTS)[rows])
    for count in (*range(1, 41), *range(1, 41)):
        np.testing.assert_allclose(model.encode_text(TEXTS[:count]), whole[:count], atol=1e-5)
    # 1, 2, 4, ... 64 rows, and where padding changes nothing 8 or 16 tokens instead of 32.
    assert model._encode._cache_size() <= 7 + (tower in ("mean", "eos")) * 7
    if tower in ("mean", "eos"):
        assert model.without_padding(model.token_ids(["dog"])).shape == (1, 8)
        assert model.without_padding(model.token_ids(TEXTS)).shape == (40, 16)
    else:
        assert model.without_padding(model.token_ids(["dog"])).shape == (1, 32)


def test_images_of_any_number(openmoji_folder):
    model, images = make(), np.random.default_rng(0).integers(0, 256, (40, 20, 30, 3), np.uint8)
    whole = model.encode_image(images)
    for count in range(1, 41):
        np.testing.assert_allclose(model.encode_image(images[:count]), whole[:count], atol=1e-5)
    assert model._encode._cache_size() == 7
    assert model.encode_image([]).shape == (0, 16)


def test_a_program_of_somebody_elses_finds_compiled_functions_again(tmp_path):
    code = """import mmjax, jax
try:
    mmjax.load("nowhere/at/all")
except Exception:
    pass
print(jax.config.jax_compilation_cache_dir)"""
    for own in ("", str(tmp_path / "own")):
        environment = os.environ | {"MMJAX_CACHE": str(tmp_path)} | ({"JAX_COMPILATION_CACHE_DIR": own} if own else {})
        environment = {name: value for name, value in environment.items() if own or "COMPILATION_CACHE" not in name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == (own or str(tmp_path / "compiled"))
