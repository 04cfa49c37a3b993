"""A new run takes parameters over from another one."""

import shutil

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.models import position
from mmjax.sharding.rules import path_name
from mmjax.training import init_from, setup
from mmjax.training.checkpoint import Checkpoints
from tests import tiny
from tests.interop import folders, image_towers


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
    config.init_from.run = configs.init_from(source=str(source[0]), parts=parts, **changes)
    return config


def test_parts_are_those_of_the_other_run_and_the_rest_is_new(source, tmp_path):
    run = setup.prepare(another(source, "image/", "logit_bias"), tmp_path)
    with jax.set_mesh(run.mesh):
        state = run.make_state()
    assert int(state.step) == 0
    alone = another(source)
    alone.init_from.run.source = ""
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
        another(source, "imag/"),
        r'init_from.run: parts: no parameter\'s path starts with "imag/"; did you mean "image/"',
    )
    refused(another(source, "image/", step=3), r"init_from.run: .* has no checkpoint of step 3; it has: 7")
    refused(another((tmp_path / "none",), "image/"), r"init_from.run: .*none is no workdir of a run")
    wider = another(source, "text/")
    wider.model.encoders.text.mlp_dim = 48
    refused(
        wider,
        r"text.mlp_dim is 64 there, .* 48; text/transformer/blocks/mlp/down/kernel is \[2, 64, 32\] there, and",
    )
    pooled = another(source, "text/")
    pooled.model.encoders.text.pooling = "map"
    refused(
        pooled, r"init_from.run: .*model.encoders.text.pooling is 'mean' there, and here it is 'map'; there is no text/"
    )
    activated = another(source, "image/")
    activated.model.encoders.image.activation = "quick_gelu"
    refused(
        activated, r"encoders.image.activation is 'gelu_tanh' there, and here it is 'quick_gelu'\. What is to differ"
    )
    twice = another(source, "image/")
    twice.init_from.again = configs.init_from(source=str(source[0]), parts=("image/pool/",))
    refused(twice, r"image/pool/\S+ is taken over by another entry too")


def taken(config, tmp_path):
    run = setup.prepare(config, tmp_path)
    with jax.set_mesh(run.mesh):
        return run, arrays(run.make_state().params)


def test_what_is_allowed_to_differ_is_new(source, tmp_path, capsys):
    config = another(source, "text/", allow=("text/pool/", "model.encoders.text.pooling"))
    config.model.encoders.text.pooling = "map"
    params = taken(config, tmp_path)[1]
    np.testing.assert_array_equal(params["text/embed/position"], source[1]["text/embed/position"])
    assert "text/pool/probe" in params
    said = " ".join(capsys.readouterr().err.split())
    assert "init_from.run: 20 arrays" in said and "new here: text/pool/attention/key/bias, " in said
    assert "left there: image, image_projection, logit_bias, logit_scale, text_projection" in said


def test_the_tokenizer_comes_with_the_embeddings_of_tokens(source, monkeypatch):
    monkeypatch.setattr(init_from.api, "load_tokenizer", lambda *_: "theirs")
    assert init_from.tokenizer_of(another(source)) == "theirs"
    assert init_from.tokenizer_of(another(source, "image/")) is None
    assert init_from.tokenizer_of(another(source, "text/embed/token_embed/")) == "theirs"
    assert init_from.tokenizer_of(another(source, allow=("text/embed/token_embed",))) is None
    captioner = another(source)
    captioner.model.decoder = configs.decoder(depth=1)
    captioner.objectives = {"captioning": configs.objective(kind="captioning")}
    assert init_from.tokenizer_of(captioner) == "theirs"


def test_positions_follow_the_resolution_and_the_length(source, tmp_path, capsys):
    config = another(source)  # all parts
    config.model.encoders.image.image_size, config.model.encoders.text.length = 56, 12
    params = taken(config, tmp_path)[1]
    assert params["image/positions/position"].shape == (16, 32) and params["text/embed/position"].shape == (12, 32)
    corner = source[1]["image/positions/position"][0]
    near = params["image/positions/position"][0]
    assert np.corrcoef(corner, near)[0, 1] > 0.9  # interpolated, not drawn anew
    np.testing.assert_allclose(params["text/embed/position"][0], source[1]["text/embed/position"][0], rtol=1e-5)
    assert "resized: image/positions/position [4, 32] to [16, 32]" in " ".join(capsys.readouterr().err.split())
    config.model.encoders.text.length = 6
    shorter = taken(config, tmp_path / "shorter")[1]["text/embed/position"]
    np.testing.assert_array_equal(shorter, source[1]["text/embed/position"][:6])


CLIP = {
    "model_type": "clip",
    "projection_dim": 16,
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    | {"vocab_size": 120, "max_position_embeddings": 8, "eos_token_id": 1},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    | {"image_size": 28, "patch_size": 14},
}


def test_a_run_starts_from_a_pretrained_folder_tower_by_tower(source, tmp_path):
    """CLIP's image tower, and the text tower of a run with its tokenizer."""
    folder = folders.write(tmp_path / "clip", "clip", CLIP)
    config = another(source, "text/")
    config.model = api.load_config(folder).model
    config.model.encoders.text = api.load_config(source[0]).model.encoders.text
    config.init_from.clip = configs.init_from(source=str(folder), parts=("image/", "image_projection/"))
    run, params = taken(config, tmp_path / "run")
    np.testing.assert_array_equal(
        params["image/class_token"][0], folders.filled("vision_model.embeddings.class_embedding", (32,))
    )
    np.testing.assert_array_equal(params["text/embed/position"], source[1]["text/embed/position"])
    assert run.tokenizer.to_json() == api.load_tokenizer(source[0]).to_json()
    assert (run.workdir / "tokenizer.mmjax.json").exists()


def test_positions_of_dinov2_are_resized_from_the_grid_that_they_were_made_for(source, tmp_path):
    folder = image_towers.CASES["dinov2"].write(tmp_path / "dinov2")
    stored = folders.filled("embeddings.position_embeddings", (1, 1 + 6 * 6, 16))[0]
    config = another(source, "text/")
    config.model.encoders.image = api.load_config(folder).model.encoders.image  # made for 24 pixels, reads 16
    config.model.encoders.image.projection = True
    config.init_from.dinov2 = configs.init_from(source=str(folder), parts=("image/",))
    kept = taken(config, tmp_path / "kept")[1]["image/positions/position"]
    np.testing.assert_array_equal(kept, stored)
    config.model.encoders.image.position_size = 0
    resized = taken(config, tmp_path / "resized")[1]["image/positions/position"]
    expected = position.resize(stored[1:], (6, 6), (4, 4), "bicubic")
    np.testing.assert_allclose(resized, np.concatenate([stored[:1], expected]), atol=1e-6)
