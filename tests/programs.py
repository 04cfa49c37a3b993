"""Running mmjax's programs as a user does: in processes of their own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmjax.training.feedback import read_metrics

ROOT = Path(__file__).resolve().parent.parent


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """The environment of a program with so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | extra


def start(module: str, *arguments: str, devices: int = 1, **extra: str) -> subprocess.Popen:
    """Starts `python -m mmjax.<module>` from the repository's root; its output comes as text."""
    return subprocess.Popen(
        [sys.executable, "-m", f"mmjax.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=environment(devices, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(module: str, *arguments: str, devices: int = 1, timeout: float = 600, **extra: str) -> tuple[int, str]:
    """Runs a program to its end; returns (exit code, output)."""
    process = start(module, *arguments, devices=devices, **extra)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def start_several(module: str, *arguments: str, devices: int, processes: int) -> list[subprocess.Popen]:
    """The processes of one program on several hosts, each with so many virtual devices."""
    return [start(module, *arguments, devices=devices, **place) for place in places(processes)]


def places(processes: int) -> list[dict[str, str]]:
    """What tells each process of several where the others are, in its environment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = [dict(zip(names, (address, str(processes), str(number)), strict=True)) for number in range(processes)]
    return found if processes > 1 else [{}]


def outputs_of(processes: Sequence[subprocess.Popen], timeout: float = 600) -> list[str]:
    """What they said until they ended. Read at the same time: a process stops at a full pipe, and the other waits."""
    with ThreadPoolExecutor() as pool:
        return [output for output, _ in pool.map(lambda process: process.communicate(timeout=timeout), processes)]


def loader_processes(process: subprocess.Popen) -> list[int]:
    """The numbers of a running program's loader processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue  # it has ended
    return found


def wait_for_steps(process: subprocess.Popen, workdir: Path, steps: int) -> None:
    """Waits until a program has written the metrics of so many steps; fails with its output if it ends before."""
    while len(read_metrics(workdir / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
