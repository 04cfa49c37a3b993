import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmjax.training.watchdog import EXIT_HUNG, Watchdog
from tests import programs


def start_and_stop_its_worker(tmp_path, hang_timeout):
    """A run whose loader process is stuck, and the number of that process."""
    process = programs.start(
        "main",
        "--config=tests/tiny.py:100000",
        f"--workdir={tmp_path}",
        "--config.loader.workers=1",
        "--config.train.checkpoint_every=100000",
        f"--config.health.hang_timeout_seconds={hang_timeout}",
    )
    programs.wait_for_steps(process, tmp_path, 8)
    (worker,) = programs.loader_processes(process)
    os.kill(worker, signal.SIGSTOP)
    return process, worker


@pytest.mark.slow
def test_a_run_whose_loader_is_stuck_ends_and_says_where(tmp_path, openmoji_folder):
    process, worker = start_and_stop_its_worker(tmp_path, 30)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_HUNG, output
    assert "config.health.hang_timeout_seconds" in output and str(tmp_path / "hang.0.txt") in output
    stacks = (tmp_path / "hang.0.txt").read_text()
    assert "nothing for" in stacks and "train_batches" in stacks and "MainThread" not in output
    assert not Path(f"/proc/{worker}").exists() or b"Z" in Path(f"/proc/{worker}/stat").read_bytes()


@pytest.mark.slow
def test_the_second_ctrl_c_ends_what_the_first_one_cannot(tmp_path, openmoji_folder):
    process, worker = start_and_stop_its_worker(tmp_path, 0)
    time.sleep(2)  # until all batches are used up that were read ahead
    process.send_signal(signal.SIGINT)
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert not Path(f"/proc/{worker}").exists() or b"Z" in Path(f"/proc/{worker}/stat").read_bytes()


def test_the_second_ctrl_c_ends_a_computation_that_never_does():
    program = (
        "import jax; from mmjax.training.loop import StopRequest\n"
        "forever = jax.jit(lambda: jax.lax.while_loop(lambda x: x < 9, lambda x: (x + 1) % 8, 0)).lower().compile()\n"
        "with StopRequest(): print('ready', flush=True); forever().block_until_ready()\n"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=programs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and "the last checkpoint is intact" in output


def test_a_hang_before_the_first_step_ends_too(tmp_path, openmoji_folder):
    os.mkfifo(tmp_path / "tokenizer.json")  # nobody writes into it: whoever opens it waits
    process = programs.start(
        "main",
        "--config=tests/tiny.py:4",
        f"--workdir={tmp_path / 'run'}",
        f"--config.model.encoders.text.tokenizer={tmp_path / 'tokenizer.json'}",
        "--config.health.hang_timeout_seconds=3",
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_HUNG, output
    assert "_tokenizer" in (tmp_path / "run" / "hang.0.txt").read_text()


def test_beats_keep_it_quiet_and_silence_does_not(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from mmjax.training.watchdog import Watchdog\n"
        "beats = int(sys.argv[1])\n"
        "with Watchdog(Path(sys.argv[2]), 3, 1.0) as watchdog:\n"
        "    for _ in range(beats): time.sleep(0.2); watchdog.beat()\n"
        "    time.sleep(0 if beats else 60)\n"
    )

    def run(beats):
        command = [sys.executable, "-c", program, str(beats), str(tmp_path)]
        return subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, timeout=300).returncode

    assert run(10) == 0 and not (tmp_path / "hang.3.txt").exists()
    assert run(0) == EXIT_HUNG and "nothing for 1 s" in (tmp_path / "hang.3.txt").read_text()


def test_zero_turns_it_off(tmp_path):
    with Watchdog(tmp_path, 0, 0.0):
        time.sleep(0.1)
    assert json.dumps([*tmp_path.iterdir()]) == "[]"


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_run_leaves_its_loader_at_work(tmp_path, openmoji_folder):
    """As SLURM and systemd send it: the trainer ends with a checkpoint, for which it may need another batch."""
    process = programs.start(
        "main", "--config=tests/tiny.py:100000", f"--workdir={tmp_path}", "--config.loader.workers=1"
    )
    programs.wait_for_steps(process, tmp_path, 4)
    (worker,) = programs.loader_processes(process)
    os.kill(worker, signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None and Path(f"/proc/{worker}").exists()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and "checkpoint saved" in output, output
