"""The benchmarks that measure mmjax alone run, and what they report has their documented names."""

import argparse
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import trace_table
from tests import programs


def measured(name, path, *arguments):
    command = [sys.executable, f"benchmarks/{name}.py", *arguments, f"--json={path}"]
    done = subprocess.run(command, cwd=programs.ROOT, env=programs.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_training_step_alone(tmp_path):
    arguments = ("--peers=", "--models=quickstart,B/16-SigLIP", "--batch=2", "--turns=1", "--starts=1", "--unroll=1")
    found = measured("train_step", tmp_path / "found.json", *arguments)
    for model in ("quickstart", "B16-SigLIP"):
        for name in ("mmjax_images_per_second", "of_matmul_rate", "first_step_seconds", "peak_memory"):
            assert found[f"{model}/{name}"] > 0
        assert found[f"{model}/of_matmul_rate"] < 1.2


WORKER = """
import sys
print('{"warm": 1}', flush=True)
for number, line in enumerate(sys.stdin):
    if line.strip() == "fail":
        raise ValueError("too large")
    print('{"turn": %d}' % number, flush=True)
"""


def test_a_worker_that_ends_says_why(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(programs.ROOT / "benchmarks")
    workers = importlib.import_module("workers")
    monkeypatch.setattr(workers, "PAUSE", 0)
    (tmp_path / "worker.py").write_text(WORKER)
    with workers.Worker(str(tmp_path / "worker.py"), []) as worker:
        assert worker.answer() == {"warm": 1}
        assert [worker.ask("steps"), worker.ask("steps")] == [{"turn": 0}, {"turn": 1}]
        for _ in range(2):
            with pytest.raises(workers.Ended, match="ValueError: too large") as found:
                worker.ask("fail")
            assert found.value.last_line == "ValueError: too large (exit code 1)"


def test_ratios_are_of_turns_and_what_failed_is_left_out(monkeypatch):
    monkeypatch.syspath_prepend(programs.ROOT / "benchmarks")
    train_step = importlib.import_module("train_step")

    def found(*seconds):
        return [{"first_step_seconds": 9.0}, *({"seconds": each, "peak_memory": 100 * each} for each in seconds)]

    starts = [{"mmjax": found(1.0, 2.0, 4.0), "open_clip": found(2.0, 3.0, 6.0)}, {"mmjax": found(3.0)}]
    arguments = argparse.Namespace(peers=["open_clip", "transformers"], batch=30)
    assert train_step.summary(starts, arguments) == {
        "mmjax_images_per_second": 12.0,
        "first_step_seconds": 9.0,
        "peak_memory": 250.0,
        "open_clip_images_per_second": 10.0,
        "open_clip_first_step_seconds": 9.0,
        "open_clip_peak_memory": 300.0,
        "over_open_clip": 1.5,
        "peak_memory_over_open_clip": pytest.approx(1 / 1.5),
    }
    assert [train_step.rotated("abc", number) for number in (0, 1, 5)] == [list("abc"), list("bca"), list("cab")]


@pytest.mark.slow
def test_a_whole_run(tmp_path, openmoji_folder):
    found = measured("end_to_end", tmp_path / "found.json", "--models=quickstart", "--steps=6", "--log-every=2")
    assert found["quickstart/examples_per_second"] > 1 and found["quickstart/first_step_seconds"] > 1
    assert 0 <= found["quickstart/data_wait_fraction"] < 1 and found["quickstart/cores_used"] > 0


def test_where_the_time_of_a_step_goes(tmp_path):
    def step(matrix, other):
        with jax.named_scope("optimizer"):
            other = jnp.sin(other) * 2
        return matrix @ matrix, other

    compiled = jax.jit(step).lower(jnp.ones((512, 512)), jnp.ones((1000, 1000))).compile()
    arrays = jnp.ones((512, 512)), jnp.ones((1000, 1000))
    found = trace_table.traced(lambda: jax.block_until_ready(compiled(*arrays)), compiled.as_text(), 3, tmp_path)
    assert {"matrix products/milliseconds", "optimizer/share", "step/milliseconds"} <= found.keys()


@pytest.mark.parametrize(
    "text, kind",
    [
        ("fusion.3 fusion.3 jit(train_step)/optimizer/mul", "optimizer"),
        ("dot.1 dot.1 jit(train_step)/image/blocks/mlp/up/dot_general", "matrix products"),
        ("custom-call.2 cudnn_fmha_forward image/blocks/attention/dot", "attention"),
        ("fusion.1 fusion.1 image/blocks/attention/query/dot_general", "matrix products"),
        ("copy.4 copy.4 ", "copies"),
        ("fusion.9 fusion.9 image/blocks/mlp/gelu", "other"),
    ],
)
def test_kinds_of_kernels(text, kind):
    assert trace_table.kind(text) == kind
