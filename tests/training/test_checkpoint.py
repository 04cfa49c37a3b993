import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.errors import UserError
from mmjax.training import setup
from mmjax.training.checkpoint import Checkpoints, saved_steps
from mmjax.training.state import TrainState
from tests import tiny

pytestmark = pytest.mark.sharding


@pytest.fixture
def run(tmp_path, openmoji_folder):
    config = tiny.get_config()
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    config.train.ema_decay = 0.9
    config.train.max_to_keep = 1
    config.train.best_metric = "eval/test/text_to_image_R@1"
    return setup.prepare(config, tmp_path / "run")


def at_step(state, step):
    return TrainState(jax.numpy.int32(step), state.params, state.opt_state, state.ema)


def test_the_latest_and_the_best_are_kept(run):
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:
        state = run.make_state()
        for step, recall in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.3)):
            checkpoints.save(at_step(state, step), {}, {}, {"eval/test/text_to_image_R@1": recall, "other": 1.0})
            checkpoints.wait()
        checkpoints.save(at_step(state, 5), {}, {}, {})
    assert saved_steps(run.workdir) == [2, 5]
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:  # as a resumed run does
        for step in (6, 7):
            checkpoints.save(at_step(state, step), {}, {}, {})
            checkpoints.wait()
    assert saved_steps(run.workdir) == [2, 7]


def test_a_state_comes_back_exactly_on_another_mesh(run, monkeypatch):
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:
        state = run.make_state()
        checkpoints.save(at_step(state, 3), run.tokenizer.to_json(), run.fingerprints, {})
    config = run.config.copy_and_resolve_references()
    config.mesh.fsdp, config.mesh.tensor = 8, 1
    other = setup.prepare(config, run.workdir)
    with jax.set_mesh(other.mesh), Checkpoints(run.workdir, config) as checkpoints:
        restored = checkpoints.restore(3, other.target)
    assert int(restored.step) == 3
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(restored, name), getattr(state, name))
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(), restored.params, other.target.params)

    model = api.load(run.workdir)
    assert model.step == 3 and model.encode_text(["dog"]).shape == (1, 16)
    jax.tree.map(np.testing.assert_array_equal, model.params, state.ema)


def test_another_config_is_refused_and_the_keys_named(run):
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:
        checkpoints.save(at_step(run.make_state(), 1), {}, {}, {})
    changed = run.config.copy_and_resolve_references()
    changed.optimizer.b2, changed.seed = 0.9, 7
    with pytest.raises(
        UserError, match=r"another config: optimizer.b2 \(0.95 there, 0.9 now\), seed \(0 there, 7 now\)"
    ):
        setup.prepare(changed, run.workdir)


def test_too_little_space_is_said_before_anything_is_compiled(tmp_path, monkeypatch, openmoji_folder):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"no space in the workdir .* 0.00 GB free"):
        setup.prepare(tiny.get_config(), tmp_path)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path, openmoji_folder):
    config = tiny.get_config()
    config.model.encoders.text.vocab_size = 1000
    with pytest.raises(UserError, match=r"vocab_size: 1000 is less than the 40\d\d tokens"):
        setup.prepare(config, tmp_path)


def test_what_is_no_run_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="is no workdir of a run"):
        api.load(tmp_path)
