"""The benchmarks that measure mmjax alone run, and what they report has their documented names."""

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
    for model in ("quickstart", "B/16-SigLIP"):
        for name in ("mmjax_images_per_second", "of_matmul_rate", "first_step_seconds", "peak_memory"):
            assert found[f"{model}/{name}"] > 0
        assert found[f"{model}/of_matmul_rate"] < 1.2


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
