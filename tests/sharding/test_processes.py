"""Two real processes of four devices each, against one process of eight."""

import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.training.checkpoint import saved_steps
from mmjax.training.feedback import read_metrics
from mmjax.training.watchdog import EXIT_HUNG
from tests import programs

ARGUMENTS = (
    "--config=tests/tiny.py:9",
    "--config.mesh.fsdp=8",
    "--config.train.checkpoint_every=3",
    "--config.train.max_to_keep=5",
    "--config.distributed.heartbeat_timeout_seconds=10",
)


def start_two(*arguments):
    return programs.start_several("main", *arguments, devices=4, processes=2)


def finish(processes, code):
    outputs = programs.outputs_of(processes)
    assert [process.returncode for process in processes] == [code, code], outputs
    return outputs


@pytest.fixture(scope="module")
def two(tmp_path_factory, openmoji_folder):
    """A finished run of two processes, and what they said."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    return workdir, finish(start_two(*ARGUMENTS, f"--workdir={workdir}"), 0)


@pytest.mark.slow
@pytest.mark.sharding
def test_two_processes_train_and_evaluate_like_one(two, tmp_path):
    workdir, outputs = two
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={tmp_path}", devices=8)
    assert code == 0, output
    assert "Retrieval on held-out data" in outputs[0] and "Retrieval" not in outputs[1]
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, workdir))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            if name.startswith("train/"):
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
            elif name.startswith("eval/"):  # a difference in the last bit may exchange two of 400 neighbours
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2 / 400), name
    # The checkpoint of two processes is one process's too.
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={workdir}", devices=8)
    assert code == 0 and "is finished at step 9" in output


@pytest.mark.slow
@pytest.mark.sharding
def test_one_of_two_processes_is_told_to_stop_and_both_do(tmp_path, openmoji_folder):
    processes = start_two(
        "--config=tests/tiny.py:3000", "--config.train.checkpoint_every=3000", f"--workdir={tmp_path}"
    )
    programs.wait_for_steps(processes[0], tmp_path, 1)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 143)
    assert saved_steps(tmp_path) == [read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]]


@pytest.mark.slow
@pytest.mark.sharding
def test_one_of_two_processes_is_killed_and_both_started_again(two, tmp_path):
    """The other one does not outlive it; the same command goes on, and ends with the same bits."""
    processes = start_two(*ARGUMENTS, f"--workdir={tmp_path / 'killed'}")
    while 3 not in saved_steps(tmp_path / "killed"):
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(programs.outputs_of(processes)))
        time.sleep(0.01)
    processes[1].kill()
    outputs = programs.outputs_of(processes, timeout=400)
    assert all(process.returncode != 0 for process in processes), outputs
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    finish(start_two(*ARGUMENTS, f"--workdir={tmp_path / 'killed'}"), 0)
    jax.tree.map(np.testing.assert_array_equal, api.load(tmp_path / "killed").params, api.load(two[0]).params)
    # One process may go on with what two began.
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={tmp_path / 'alone'}", devices=8)
    assert code == 0 and "resuming at" in output, output
    whole, alone = (read_metrics(folder / "metrics.jsonl") for folder in (two[0], tmp_path / "alone"))
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (whole, alone)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.sharding
def test_when_one_of_two_processes_is_stuck_both_end_and_say_where(tmp_path, openmoji_folder):
    """It lives, so no heartbeat fails; the other one waits for it inside a collective."""
    processes = start_two(
        "--config=tests/tiny.py:100000",
        "--config.loader.workers=1",
        f"--workdir={tmp_path}",
        "--config.train.checkpoint_every=100000",
        "--config.health.hang_timeout_seconds=100",
    )
    programs.wait_for_steps(processes[0], tmp_path, 5)
    (worker,) = programs.loader_processes(processes[1])
    os.kill(worker, signal.SIGSTOP)
    outputs = programs.outputs_of(processes, timeout=400)
    # Whoever is first ends the other one, whose coordinator or peer is then gone.
    assert EXIT_HUNG in [process.returncode for process in processes], outputs
    assert all(process.returncode != 0 for process in processes)
    assert list(tmp_path.glob("hang.*.txt"))


@pytest.mark.slow
@pytest.mark.sharding
def test_a_checkpoint_that_is_damaged_for_one_process_is_set_aside_by_both(two, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "9")
    own = workdir / "checkpoints" / "6" / "params" / "ocdbt.process_1"
    written = max((path for path in own.rglob("d/*")), key=lambda path: path.stat().st_size)
    written.write_bytes(written.read_bytes()[: written.stat().st_size // 2])
    outputs = finish(start_two(*ARGUMENTS, f"--workdir={workdir}"), 0)
    assert "resuming at 3" in outputs[0] and (workdir / "damaged_checkpoints" / "6").is_dir(), outputs[0]
    jax.tree.map(np.testing.assert_array_equal, api.load(workdir).params, api.load(two[0]).params)


def run_two(program):
    """What two processes of a program say that join each other first."""
    joining = (
        "import jax, numpy as np\n"
        "from mmjax import config, runtime\n"
        "from mmjax.sharding import distributed\n"
        "runtime.configure()\n"
        "distributed.initialize(config.default().distributed)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", joining + program],
            cwd=programs.ROOT,
            env=programs.environment(**place),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in programs.places(2)
    ]
    return finish(processes, 0)


def test_all_processes_go_by_what_the_first_one_sees():
    outputs = run_two(
        "seen = [[1, 20, 300], []][jax.process_index()]\n"
        "array = distributed.array_from_first_process(np.array([[0.25, -7.0]]) * (1 - jax.process_index()))\n"
        "print(distributed.from_first_process(seen), distributed.from_first_process(seen[::-1]), end=' ')\n"
        "print(array.tolist(), array.dtype)\n"
    )
    shown = "[1, 20, 300] [300, 20, 1] [[0.25, -7.0]] float64"
    assert all(shown in output for output in outputs)


def test_at_a_second_start_all_processes_compile_or_none_does(monkeypatch, tmp_path):
    """One that waits for the others while they compile loses them after 30 s."""
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path))
    program = (
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "found = []\n"
        "jax.monitoring.register_event_listener(lambda event, **more: found.append(event.endswith('/cache_hits')))\n"
        "distributed.any_process(True)\n"
        "print('found in the cache:', sum(found), 'of', len(found))\n"
    )
    run_two(program)
    lines = [[line for line in output.splitlines() if "in the cache" in line] for output in run_two(program)]
    assert lines[0] == lines[1] != []
