"""The launchers, with the cloud's and the cluster's commands replaced by ones that note their arguments."""

import os
import subprocess

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
    assert "python -m mmjax.main --config=configs/vit_b.py --workdir=/a\\ b" in calls


def test_tpu_vm_without_arguments_explains_itself(tmp_path):
    result = run("tpu_vm.sh", tmp_path, ["gcloud"])
    assert result.returncode == 2 and "launch/tpu_vm.sh NAME ZONE" in result.stderr
    assert not (tmp_path / "calls").exists()


def test_slurm_starts_the_program_in_every_task(tmp_path):
    result = run("slurm.sh", tmp_path, ["srun"], "--config=configs/vit_b.py")
    assert result.returncode == 0, result.stderr
    expected = ["srun", "python", "-m", "mmjax.main", "--config=configs/vit_b.py"]
    assert (tmp_path / "calls").read_text().split() == expected
