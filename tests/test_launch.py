"""The launchers, with the cloud's and the cluster's commands replaced by ones that note their arguments."""

import os
import signal
import subprocess
import time

import pytest

from tests.programs import ROOT


def run(script, tmp_path, commands, *arguments):
    for command in commands:
        path = tmp_path / command
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" {command} "$@" >> {tmp_path}/calls\n')
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(
        [ROOT / "launch" / script, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_tpu_vm_copies_the_checkout_and_runs_on_every_host(tmp_path):
    result = run("tpu_vm.sh", tmp_path, ["gcloud"], "pod", "zone-a", "--config=configs/vit_b.py", "--workdir=/a b")
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--worker=all") == 2 and calls.count("--zone=zone-a") == 2
    command = ".venv/bin/python -m mmjax.main --config=configs/vit_b.py --workdir=/a\\ b"
    assert f"launch/detached.sh $run launch/keep_running.sh {command}" in calls


def test_tpu_vm_without_arguments_explains_itself(tmp_path):
    result = run("tpu_vm.sh", tmp_path, ["gcloud"])
    assert result.returncode == 2 and "launch/tpu_vm.sh NAME ZONE" in result.stderr
    assert not (tmp_path / "calls").exists()


def test_slurm_starts_the_program_in_every_task(tmp_path):
    result = run("slurm.sh", tmp_path, ["srun"], "--config=configs/vit_b.py")
    assert result.returncode == 0, result.stderr
    expected = [
        "srun",
        "--kill-on-bad-exit=1",
        "launch/keep_running.sh",
        "python",
        "-m",
        "mmjax.main",
        "--config=configs/vit_b.py",
    ]
    assert (tmp_path / "calls").read_text().split() == expected


def keep_running(tmp_path, codes):
    """Starts it with a command that ends with one code after the other; returns the result and how often it ran."""
    command = tmp_path / "command"
    command.write_text(
        f"#!/usr/bin/env bash\nruns=$(cat {tmp_path}/runs 2>/dev/null || echo 0)\n"
        f"codes=({' '.join(map(str, codes))})\necho $((runs + 1)) > {tmp_path}/runs\nexit ${{codes[$runs]}}\n"
    )
    command.chmod(0o755)
    result = subprocess.run(
        [ROOT / "launch" / "keep_running.sh", command],
        env=os.environ | {"MMJAX_RESTART_SECONDS": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result, int((tmp_path / "runs").read_text())


@pytest.mark.parametrize("codes", [[0], [2], [130], [143], [75, 0], [1, 134, 75, 2], [75] * 5 + [0]])
def test_what_hung_or_crashed_is_started_again(tmp_path, codes):
    result, runs = keep_running(tmp_path, codes)
    assert result.returncode == codes[-1] and runs == len(codes), result.stderr
    assert result.stderr.count("starting again") == len(codes) - 1


def test_what_crashes_again_and_again_is_given_up(tmp_path):
    result, runs = keep_running(tmp_path, [1] * 20)
    assert result.returncode == 1 and runs == 6 and "giving up" in result.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_are_passed_on_and_the_command_may_take_its_time(tmp_path, number, code):
    command = tmp_path / "command"
    command.write_text(
        f"#!/usr/bin/env bash\ntrap 'sleep 0.5; echo saved; exit {code}' {number.name[3:]}\ntouch {tmp_path}/ready\n"
        "while :; do sleep 0.05; done\n"
    )
    command.chmod(0o755)
    # A shell cannot trap what its parent ignores.
    started = ["env", "--default-signal=INT", ROOT / "launch" / "keep_running.sh", command]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code and output == "saved\n"


def test_stopped_between_two_starts_it_does_not_start_again(tmp_path):
    command = tmp_path / "command"
    command.write_text(f"#!/usr/bin/env bash\necho run >> {tmp_path}/runs\nexit 75\n")
    command.chmod(0o755)
    process = subprocess.Popen(
        [ROOT / "launch" / "keep_running.sh", command],
        env=os.environ | {"MMJAX_RESTART_SECONDS": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "starting again" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143 and (tmp_path / "runs").read_text() == "run\n"


def test_detached_outlives_what_started_it(tmp_path):
    script = [str(ROOT / "launch" / "detached.sh"), str(tmp_path / "run")]
    result = subprocess.run([*script, "bash", "-c", "echo made; exit 3"], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (3, "made\n")
    command = ["bash", "-c", f"sleep 3; echo late; touch {tmp_path}/done"]
    first = subprocess.Popen([*script, *command], start_new_session=True, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "pid").exists():
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)  # all that belongs to the connection
    first.wait(60)
    again = subprocess.run([*script, *command], capture_output=True, text=True, timeout=300)
    assert "it runs already" in again.stderr and again.stdout == "late\n" and (tmp_path / "done").exists()


def test_detached_starts_anew_where_a_number_was_left_by_what_did_not_end_itself(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pid").write_text(str(os.getpid()))  # after a reboot it may be anybody's
    script = [str(ROOT / "launch" / "detached.sh"), str(tmp_path / "run")]
    result = subprocess.run([*script, "echo", "made"], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, "made\n")
