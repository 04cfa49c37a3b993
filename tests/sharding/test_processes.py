"""Two real processes of four devices each, against one process of eight."""

import signal
import socket
import time

import pytest

from mmjax.training.checkpoint import saved_steps
from mmjax.training.feedback import read_metrics
from tests import programs

ARGUMENTS = ("--config=tests/tiny.py:6", "--config.mesh.fsdp=2", "--config.train.checkpoint_every=3")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(*arguments):
    address = f"127.0.0.1:{free_port()}"
    return [
        programs.start(
            "main",
            *arguments,
            devices=4,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]


def finish(processes, code):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], outputs
    return outputs


@pytest.mark.slow
@pytest.mark.sharding
def test_two_processes_train_and_evaluate_like_one(tmp_path, openmoji_folder):
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={tmp_path / 'one'}", devices=8)
    assert code == 0, output
    outputs = finish(start_two(*ARGUMENTS, f"--workdir={tmp_path / 'two'}"), 0)
    assert "Retrieval on held-out data" in outputs[0] and "Retrieval" not in outputs[1]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            if name.startswith(("train/", "eval/")):
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
    # The checkpoint of two processes is one process's too.
    code, output = programs.run("main", *ARGUMENTS, f"--workdir={tmp_path / 'two'}", devices=8)
    assert code == 0 and "is finished at step 6" in output


@pytest.mark.slow
@pytest.mark.sharding
def test_one_of_two_processes_is_told_to_stop_and_both_do(tmp_path, openmoji_folder):
    processes = start_two(
        "--config=tests/tiny.py:3000", "--config.train.checkpoint_every=3000", f"--workdir={tmp_path}"
    )
    while not read_metrics(tmp_path / "metrics.jsonl") and processes[0].poll() is None:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 143)
    assert saved_steps(tmp_path) == [read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]]
