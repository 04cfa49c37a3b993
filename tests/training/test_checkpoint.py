import asyncio
import gc
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.errors import UserError
from mmjax.training import checkpoint, loop, setup
from mmjax.training.checkpoint import Checkpoints, checksums, saved_steps
from tests import programs, tiny

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
    return state.replace(step=jax.numpy.int32(step))


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


def test_what_a_separate_evaluation_finds_best_is_kept(run):
    def lines(*recalls):
        return [{"step": step, "eval/test/text_to_image_R@1": recall} for step, recall in enumerate(recalls, 1)]

    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:
        state = run.make_state()
        for step in (1, 2, 3):
            checkpoints.save(at_step(state, step), {}, {}, {})
            checkpoints.wait()
            if step == 2:
                checkpoint.mark_best(run.workdir, run.config, lines(0.9, 0.5))  # 1 is gone by now
    assert saved_steps(run.workdir) == [2, 3]
    checkpoint.mark_best(run.workdir, run.config, lines(0.9, 0.5, float("nan")))
    assert json.loads((run.workdir / "eval" / "best.json").read_text()) == {
        "step": 2,
        "eval/test/text_to_image_R@1": 0.5,
    }
    (run.workdir / "eval" / "best.json").write_text("{")  # written by nobody, but a full disk is not the end of a run
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:
        checkpoints.save(at_step(state, 4), {}, {}, {})
    assert saved_steps(run.workdir) == [4]


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
    for name in ("params", "opt_state", "ema", "health"):
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


def test_a_checksum_changes_with_every_bit_and_with_the_order(run):
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(16, 24)).astype(np.float32), "b": rng.integers(0, 9, 8).astype(np.int32)}
    sharded = jax.device_put(tree, jax.NamedSharding(run.mesh, jax.P("fsdp")))
    with jax.set_mesh(run.mesh):
        expected = checksums(sharded)
    assert checksums(tree) == expected
    bits = tree["a"].view(np.uint32)
    for place in ((0, 0), (7, 3), (15, 23)):
        for bit in (0, 31):
            bits[place] ^= np.uint32(1 << bit)
            changed = checksums(tree)
            assert [name for name in expected if changed[name] != expected[name]] == ["a float32[16, 24]"]
            bits[place] ^= np.uint32(1 << bit)
    assert checksums({**tree, "a": tree["a"][::-1].copy()}) != expected
    assert checksums({**tree, "a": tree["a"].astype(jax.numpy.bfloat16)}) != expected


@pytest.fixture(scope="module")
def finished(tmp_path_factory, openmoji_folder):
    """A run of eight steps whose checkpoints are all there; two of them are the last before its end."""
    config = tiny.get_config()
    config.evaluators, config.train.max_to_keep = {}, 10
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert loop.train(config, workdir) == 0
    assert saved_steps(workdir) == [2, 4, 6, 8]
    return config, workdir


def interrupted(finished, tmp_path):
    """A copy of the run, as if it had been killed after step 6."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[1], workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    (workdir / "result.json").unlink()
    return workdir


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut_short(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty_metadata(folder):
    for path in folder.rglob("_METADATA"):
        path.write_bytes(b"")


DAMAGES = {
    "cut short": cut_short,
    "a flipped bit": flip_a_bit,
    "no parameters": lambda folder: shutil.rmtree(folder / "params"),
    "no optimizer": lambda folder: shutil.rmtree(folder / "opt_state"),
    "no checksums": lambda folder: shutil.rmtree(folder / "checksums"),
    "no fingerprints": lambda folder: shutil.rmtree(folder / "data"),
    "empty metadata": empty_metadata,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(finished, tmp_path, capsys, damage):
    config, whole = finished
    workdir = interrupted(finished, tmp_path)
    DAMAGES[damage](workdir / "checkpoints" / "6")
    assert loop.train(config, workdir) == 0
    told = capsys.readouterr().err
    if damage != "no fingerprints":  # those of an older checkpoint will do
        assert f"{workdir / 'checkpoints' / '6'} is damaged" in told and "resuming at 4" in told
        assert (workdir / "damaged_checkpoints" / "6").is_dir()
    assert saved_steps(workdir) == [2, 4, 6, 8]
    jax.tree.map(np.testing.assert_array_equal, api.load(workdir).params, api.load(whole).params)


def test_a_finished_run_whose_last_checkpoint_is_damaged_makes_it_again(finished, tmp_path, capsys):
    config, whole = finished
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    flip_a_bit(workdir / "checkpoints" / "8" / "params")
    assert loop.train(config, workdir) == 0
    assert "resuming at 6" in capsys.readouterr().err and (workdir / "result.json").exists()
    jax.tree.map(np.testing.assert_array_equal, api.load(workdir).params, api.load(whole).params)
    assert loop.train(config, workdir) == 0
    assert "is finished at step 8" in capsys.readouterr().err


def test_with_every_checkpoint_damaged_the_run_does_not_start_anew_by_itself(finished, tmp_path):
    workdir = interrupted(finished, tmp_path)
    for step in saved_steps(workdir):
        cut_short(workdir / "checkpoints" / str(step))
    with pytest.raises(UserError, match="no checkpoint in .* is intact"):
        loop.train(finished[0], workdir)
    assert sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_damaged_checkpoint_is_not_loaded(finished, tmp_path):
    workdir = interrupted(finished, tmp_path)
    flip_a_bit(workdir / "checkpoints" / "6" / "params")
    with pytest.raises(UserError, match=r"checkpoint .*6 is damaged"):
        api.load(workdir)
    assert api.load(workdir, step=4).step == 4


def test_the_reads_that_are_dropped_when_one_fails_print_nothing(finished, tmp_path, monkeypatch):
    """Orbax leaves them waiting in an event loop that is closed; each complains when it is collected."""
    workdir, complaints = interrupted(finished, tmp_path), []

    async def waiting():
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            raise ValueError("where it stopped") from error

    async def failing():
        raise ValueError("cut short")

    class Reader:
        @staticmethod
        def restore(*_, **__):
            async def read():
                return await asyncio.gather(waiting(), failing(), waiting())

            loop = asyncio.new_event_loop()
            try:
                return loop.run_until_complete(read())
            finally:
                loop.close()

    monkeypatch.setattr(checkpoint, "_reader", Reader)
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    hook = sys.unraisablehook
    with pytest.raises(UserError, match=r"checkpoint .*6 is damaged: cut short"):
        api.load(workdir)
    gc.collect()
    assert not complaints and sys.unraisablehook is hook


def test_checkpoints_hold_no_pickle(finished):
    files = [path for path in (finished[1] / "checkpoints").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".npy", ".pt")
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, openmoji_folder):
    """The run's folder is a file system of its own, in which two checkpoints find room, but not ten."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    (tmp_path / "run").mkdir()
    mount = f"mount -t tmpfs -o size=9m tmpfs {tmp_path}/run"
    if subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("a file system of a test's own cannot be mounted here")
    arguments = f"--config=tests/tiny.py:40 --workdir={tmp_path}/run --config.train.max_to_keep=20"
    script = f"{mount}; {sys.executable} -m mmjax.main {arguments}; echo code $?; cp -r {tmp_path}/run {tmp_path}/copy"
    finished = subprocess.run(
        [*inside, script], cwd=programs.ROOT, env=programs.environment(), capture_output=True, text=True, timeout=300
    )
    assert "code 2" in finished.stdout and "Traceback" not in finished.stderr, finished.stderr
    last = saved_steps(tmp_path / "copy")[-1]
    error = finished.stderr.strip().splitlines()[-1]
    assert error.startswith("error: no space left in") and f"the last good one is of step {last}" in error
    assert api.load(tmp_path / "copy").step == last
    code, output = programs.run("main", *arguments.split()[:1], f"--workdir={tmp_path}/copy")
    assert code == 0 and f"resuming at {last}" in output, output


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_told_too(run, monkeypatch):
    full = ValueError('RESOURCE_EXHAUSTED: Failed writing "d/c20a": No space left on device [os_error_code=28]')
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, run.config) as checkpoints:
        checkpoints.save(at_step(run.make_state(), 1), {}, {}, {})
        checkpoints.wait()

        def fail():
            raise full

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "wait_until_finished", fail)
            with pytest.raises(UserError, match="no space left in .* the last good one is of step 1"):
                checkpoints.wait()


def test_a_checkpoint_of_another_model_is_not_taken_for_a_damaged_one(finished, tmp_path):
    workdir = interrupted(finished, tmp_path)
    text = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(text.replace('"embed_dim": 16', '"embed_dim": 32'))
    config = finished[0].copy_and_resolve_references()
    config.model.embed_dim = 32
    with pytest.raises(UserError, match=r"is of another model, .*params.* differ in image_projection/kernel"):
        loop.train(config, workdir)
    assert saved_steps(workdir) == [2, 4, 6]


def test_damaged_metrics_of_an_old_checkpoint_do_not_stop_a_run(finished, tmp_path, capsys):
    workdir = interrupted(finished, tmp_path)
    config = finished[0].copy_and_resolve_references()
    config.evaluators.test = tiny.get_config().evaluators.test
    config.train.best_metric = "eval/test/text_to_image_R@1"
    folder = workdir / "checkpoints" / "2" / "metrics"
    folder.mkdir(exist_ok=True)
    (folder / "metrics").write_text('{"eval/test/text_to_im')
    assert loop.train(config, workdir) == 0
    assert "metrics of checkpoint 2 are damaged" in capsys.readouterr().err
    assert (workdir / "damaged_checkpoints" / "2").is_dir() and api.load(workdir).step == 8
