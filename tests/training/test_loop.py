"""Whole runs, in processes of their own."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mmjax import api
from mmjax.training.checkpoint import saved_steps
from mmjax.training.feedback import MetricWriter, read_metrics
from tests import programs

STEPS = 30
ARGUMENTS = (f"--config=tests/tiny.py:{STEPS}", "--config.train.checkpoint_every=3", "--config.train.max_to_keep=3")


def parameters(workdir):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(api.load(workdir).params)]


def assert_identical(one, two):
    for a, b in zip(parameters(one), parameters(two), strict=True):
        np.testing.assert_array_equal(a, b)


def metric_lines(workdir):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, openmoji_folder):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={workdir}")
    assert code == 0, output
    return workdir, output


@pytest.mark.slow
def test_a_run_ends_with_a_table_and_says_where_everything_is(uninterrupted):
    workdir, output = uninterrupted
    for text in ("Retrieval on held-out data", "text to image", "R@10", str(workdir / "checkpoints"), "mmjax.load("):
        assert text in output
    assert f"step {STEPS}/{STEPS}" in output and "ETA" in output
    lines = metric_lines(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"train/contrastive_loss", "train/grad_norm", "train/learning_rate", "perf/step_seconds"} <= lines[1].keys()
    assert "perf/first_step_seconds" in lines[0] and "perf/step_seconds" not in lines[0]
    assert list(workdir.glob("events.out.tfevents*")) and (workdir / "tokenizer.json").exists()
    result = json.loads((workdir / "result.json").read_text())
    assert "eval/test/text_to_image_R@1" in result["metrics"]
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == STEPS


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={tmp_path}")
    assert code == 0, output
    assert_identical(workdir, tmp_path)


@pytest.mark.slow
def test_killed_ten_times_anywhere_and_run_again_the_result_is_the_same_bits(uninterrupted, tmp_path):
    """SIGKILL at random moments, every second time while a checkpoint is being written, then to the end."""
    workdir, _ = uninterrupted
    moments, while_saving = random.Random(0), 0
    for number in range(10):
        wanted = max(saved_steps(tmp_path), default=0) + moments.randint(1, 6)
        metrics, unfinished = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
        before = metrics.stat().st_ino if metrics.exists() else None
        process = programs.start("main", *ARGUMENTS, f"--workdir={tmp_path}")
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_ino != before):
            time.sleep(0.005)  # what is in it was written before the last kill
        while process.poll() is None and max((line["step"] for line in metric_lines(tmp_path)), default=0) < wanted:
            time.sleep(0.005)
        while process.poll() is None and number % 2 == 0 and not saved_steps(tmp_path):
            time.sleep(0.005)  # where writing is slow, no checkpoint would ever be whole
        if number % 2 == 0:
            time.sleep(moments.random())
        while process.poll() is None and number % 2 and not list(unfinished.glob("*.orbax-checkpoint-tmp")):
            time.sleep(0.001)
        process.kill()
        process.communicate()
        while_saving += bool(list(unfinished.glob("*.orbax-checkpoint-tmp")))
    assert while_saving >= 2
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={tmp_path}")
    assert code == 0 and "resuming at" in output, output
    assert not list(unfinished.glob("*.orbax-checkpoint-tmp"))
    assert_identical(workdir, tmp_path)
    assert [line["step"] for line in metric_lines(tmp_path)] == list(range(1, STEPS + 1))
    losses = [[line["train/loss"] for line in metric_lines(folder)] for folder in (workdir, tmp_path)]
    assert losses[0] == losses[1]
    seconds = json.loads((tmp_path / "time.json").read_text())["seconds"]
    assert seconds["restart"] > 5 * seconds["start"] / 2 and metric_lines(tmp_path)[-1]["goodput/restart"] > 0.5


@pytest.mark.slow
def test_a_second_start_compiles_nothing_that_takes_over_a_second_though_the_cache_was_moved(tmp_path, openmoji_folder):
    program = (
        "import sys, jax, runpy, threading\n"
        "hits = set()\n"  # the threads in which the next program to compile was found in the cache
        "def count(event, **more):\n"
        "    if event.endswith('compilation_cache/cache_hits'): hits.add(threading.get_ident()); print('FOUND')\n"
        "def tell(event, seconds, **more):\n"
        "    if 'backend_compile' in event:\n"  # its time includes that of looking into the cache
        "        if threading.get_ident() not in hits and seconds > 1: print('COMPILED', seconds, more)\n"
        "        hits.discard(threading.get_ident())\n"
        "jax.monitoring.register_event_listener(count)\n"
        "jax.monitoring.register_event_duration_secs_listener(tell)\n"
        "sys.argv = ['mmjax.main', *sys.argv[1:]]\n"
        "runpy.run_module('mmjax.main', run_name='__main__')\n"
    )

    def start(name, cache):
        command = [sys.executable, "-c", program, "--config=tests/tiny.py:4", f"--workdir={tmp_path / name}"]
        environment = programs.environment(MMJAX_CACHE=str(cache))
        finished = subprocess.run(command, cwd=programs.ROOT, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    cache, moved = tmp_path / "cache", tmp_path / "moved"
    cache.mkdir()
    (cache / openmoji_folder.name).symlink_to(openmoji_folder)
    first = start("first", cache)
    cache.rename(moved)
    second = start("second", moved)
    assert "COMPILED" in first and "FOUND" not in first
    assert "COMPILED" not in second and "FOUND" in second, second


@pytest.mark.slow
@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_saves_and_goes_on(uninterrupted, tmp_path, number, expected):
    workdir, _ = uninterrupted
    arguments = (*ARGUMENTS, f"--workdir={tmp_path}", "--config.train.checkpoint_every=1000")
    process = programs.start("main", *arguments)
    while process.poll() is None and len(metric_lines(tmp_path)) < 4:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected, output
    assert "the same command goes on from there" in output and "Traceback" not in output
    assert len(saved_steps(tmp_path)) == 1
    code, output = programs.run("main", *arguments)
    assert code == 0, output
    assert_identical(workdir, tmp_path)


@pytest.mark.slow
def test_a_finished_run_says_so_and_another_config_is_refused(uninterrupted):
    workdir, _ = uninterrupted
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={workdir}")
    assert code == 0 and f"is finished at step {STEPS}" in output and "Retrieval on held-out data" in output
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={workdir}", "--config.optimizer.b1=0.8")
    assert code == 2 and "optimizer.b1 (0.9 there, 0.8 now)" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_resumed_run_may_have_other_devices_and_workers(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    process = programs.start("main", *ARGUMENTS, f"--workdir={tmp_path}")
    while process.poll() is None and max(saved_steps(tmp_path), default=0) < 6:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    code, output = programs.run(
        "main", *ARGUMENTS, f"--workdir={tmp_path}", "--config.loader.workers=1", "--config.mesh.fsdp=2", devices=4
    )
    assert code == 0, output
    for a, b in zip(metric_lines(workdir), metric_lines(tmp_path), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)


def test_metrics_of_repeated_steps_are_taken_back(tmp_path):
    writer = MetricWriter(tmp_path)
    assert not (tmp_path / "events").exists()  # what writes it is imported late: it imports PyTorch
    for step in range(1, 6):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    writer = MetricWriter(tmp_path, resumed_step=3)
    writer.write(4, {"train/loss": 40.0})
    writer.close()
    assert [line["train/loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]
