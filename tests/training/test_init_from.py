"""A new run takes parameters over from another one."""

import shutil

import jax
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.sharding.rules import path_name
from mmjax.training import setup
from mmjax.training.checkpoint import Checkpoints
from tests import tiny


def save(run, state):
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:
        checkpoints.save(state, run.tokenizer.to_json(), run.fingerprints, {})


@pytest.fixture(scope="module")
def source(tmp_path_factory, openmoji_folder):
    """A run with a checkpoint at step 7."""
    run = setup.prepare(tiny.get_config(), tmp_path_factory.mktemp("source") / "run")
    with jax.set_mesh(run.mesh):
        state = run.make_state().replace(step=jax.numpy.int32(7))
    save(run, state)
    return run.workdir, arrays(state.params)


def arrays(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def another(source, *parts, **changes):
    """A config with another seed, another mesh and a moving average, which takes over these parts."""
    config = tiny.get_config()
    config.seed, config.mesh.fsdp, config.train.ema_decay = 1, 2, 0.9
    config.init_from.workdir, config.init_from.parts = str(source[0]), parts
    config.init_from.update(changes)
    return config


def test_parts_are_those_of_the_other_run_and_the_rest_is_new(source, tmp_path):
    run = setup.prepare(another(source, "image/", "logit_bias"), tmp_path)
    with jax.set_mesh(run.mesh):
        state = run.make_state()
    assert int(state.step) == 0
    alone = another(source)
    alone.init_from.workdir = ""
    plain = setup.prepare(alone, tmp_path / "plain")
    with jax.set_mesh(plain.mesh):
        new = arrays(plain.make_state().params)
    for name, value in arrays(state.params).items():
        taken = name.startswith(("image/", "logit_bias"))
        np.testing.assert_array_equal(value, source[1][name] if taken else new[name], name)
        np.testing.assert_array_equal(arrays(state.ema)[name], value)
    assert (new["image/patches/patch_embed/kernel"] != source[1]["image/patches/patch_embed/kernel"]).any()
    with pytest.raises(RuntimeError, match="deleted"), jax.set_mesh(run.mesh):
        run.make_state()  # what was taken is in the state now, and not on the devices a second time
    placed = jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, state.params, run.target.params)
    assert all(jax.tree.leaves(placed))
    buffers = [leaf.unsafe_buffer_pointer() for tree in (state.params, state.ema) for leaf in addressable(tree)]
    assert len(set(buffers)) == len(buffers)  # the first step is given all of them


def addressable(tree):
    return [leaf.addressable_data(0) for leaf in jax.tree.leaves(tree)]


def test_a_resumed_run_no_longer_needs_the_other_one(source, tmp_path):
    moved = tmp_path / "other"
    shutil.copytree(source[0], moved)
    config = another((moved,), "text/")
    run = setup.prepare(config, tmp_path / "run")
    with jax.set_mesh(run.mesh):
        save(run, run.make_state().replace(step=jax.numpy.int32(1)))
    shutil.rmtree(moved)
    setup.prepare(config, tmp_path / "run")


def test_what_does_not_fit_is_named(source, tmp_path):
    def refused(config, message):
        with pytest.raises(UserError, match=message):
            setup.prepare(config, tmp_path)

    refused(
        another(source, "imag/"), r'init_from.parts: no parameter\'s path starts with "imag/"; did you mean "image/"'
    )
    refused(another(source), r'init_from.parts: no parameter\'s path starts with ""; known: image/, image_projection/')
    refused(another(source, "image/", step=3), r"init_from.workdir: .* has no checkpoint of step 3; it has: 7")
    refused(another((tmp_path / "none",), "image/"), r"init_from.workdir: .*none is no workdir of a run")
    wider = another(source, "text/")
    wider.model.encoders.text.length = 12
    refused(wider, r"init_from.workdir: in .* text/embed/position is \[8, 32\], and here it is \[12, 32\]")
    pooled = another(source, "text/")
    pooled.model.encoders.text.pooling = "map"
    refused(pooled, r"init_from.workdir: in .* there is no text/pool/\S+, and here it is \[")
