"""A teacher from another run."""

import shutil

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.sharding.mesh import make_mesh
from mmjax.training import loop, setup
from mmjax.training.checkpoint import saved_steps
from tests import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, openmoji_folder):
    config = tiny.get_config(2)
    config.evaluators, config.optimizer.warmup = {}, 1.0
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    assert loop.train(config, workdir) == 0
    return workdir


def student(teacher, **changes):
    config = tiny.get_config(4)
    config.evaluators = {}
    config.model.encoders.image.image_size = 42  # the teacher sees 28 pixels
    config.model.encoders.text.update(changes)
    config.objectives.likeness = configs.objective(kind="similarity_distillation")
    config.teacher.source = str(teacher)
    return config


def test_its_similarities_are_the_labels_and_it_does_not_change(teacher, tmp_path):
    run = setup.prepare(student(teacher), tmp_path)
    assert run.config.teacher.step == 2
    before = api.load(teacher).params
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 42, 42, 3), np.uint8),
        "text": rng.integers(1, 4000, (16, 8)).astype(np.int32),
    }
    with jax.set_mesh(run.mesh):
        state = run.make_state().replace(step=jax.numpy.int32(2))
        divergences = []
        for _ in range(6):
            state, metrics = run.train_step(state.replace(step=jax.numpy.int32(2)), batch, ("likeness",))
            divergences.append(float(metrics["train/likeness_kl"]))
    assert divergences[-1] < divergences[0]
    jax.tree.map(np.testing.assert_array_equal, run.train_step.keywords["teacher_params"], before)


def test_a_resumed_student_keeps_to_the_checkpoint_that_it_began_with(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    workdir = tmp_path / "student"
    assert loop.train(student(tmp_path / "teacher"), workdir) == 0
    folder = tmp_path / "teacher" / "checkpoints"
    shutil.copytree(folder / "2", folder / "9")  # the teacher's run has gone on
    assert saved_steps(tmp_path / "teacher") == [2, 9]
    assert loop.train(student(tmp_path / "teacher"), workdir) == 0
    assert api.load_config(workdir).teacher.step == 2


def test_what_does_not_fit_the_student_is_told(teacher, tmp_path):
    with pytest.raises(UserError, match="text.length: 10 is not the 8 of the teacher"):
        setup.prepare(student(teacher, length=10), tmp_path / "length")
    with pytest.raises(UserError, match="config.teacher.source: .*nowhere"):
        setup.prepare(student(tmp_path / "nowhere"), tmp_path / "missing")


def test_a_mesh_that_does_not_divide_a_model_is_told_before_it_is_read(teacher):
    with pytest.raises(UserError, match="model.encoders.image.width: 32 is not divisible by mesh.fsdp 3"):
        api.load(teacher, mesh=make_mesh(fsdp=3, devices=jax.devices()[:3]))
