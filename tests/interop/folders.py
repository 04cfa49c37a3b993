"""Folders of pretrained models with weights that need no other library: each tensor is drawn from its own name."""

import json
import zlib
from pathlib import Path

import jax
import numpy as np

from mmjax.interop import pretrained, store, table
from mmjax.interop.registry import FAMILIES
from mmjax.sharding.mesh import make_mesh

GOLDENS = Path(__file__).parent / "goldens"


def filled(name, shape):
    """The values of a tensor: small, near one for the scales of normalisations; of the name and shape alone."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    values = draw.normal(0, 0.08, shape).astype(np.float32)
    is_scale = len(shape) == 1 and name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight"))
    return values + np.float32(1) if is_scale else values


def write(folder, family, settings, **files):
    """A folder of a family with these settings (its config.json) and other JSON files, by name without ending."""
    own = FAMILIES[family]
    contents = {f"{name}.json": content for name, content in files.items()}
    config = own.to_config(settings, contents)
    shapes = pretrained.shapes_of(config, make_mesh(devices=jax.devices()[:1]))
    tensors = {name: filled(name, shape) for name, shape in table.expected(own.table(config), shapes).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {own.settings: settings, **contents}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    store.save_tensors(folder / own.weights, tensors)
    return folder


def tensors_of(folder, weights="model.safetensors"):
    """All tensors of a folder, in memory."""
    tensors = store.open_tensors(store.find(folder))
    return {name: np.array(tensors.get(name)) for name in tensors.names()}


def assert_same_tensors(folder, other, ignored=()):
    """The same names, shapes and bits, but for what is ignored of the first folder."""
    ours, theirs = tensors_of(folder), tensors_of(other)
    ours = {name: value for name, value in ours.items() if name not in ignored}
    assert sorted(ours) == sorted(theirs)
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        np.testing.assert_array_equal(value, theirs[name], name)


def pixels(count, size, seed=0):
    """Random images: uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def relative_error(found, wanted):
    """The largest difference, relative to the largest value that is wanted."""
    return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()
