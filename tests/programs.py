"""Running mmjax's programs as a user does: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

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


def run(module: str, *arguments: str, devices: int = 1, timeout: float = 300, **extra: str) -> tuple[int, str]:
    """Runs a program to its end; returns (exit code, output)."""
    process = start(module, *arguments, devices=devices, **extra)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def loader_processes(process: subprocess.Popen) -> list[int]:
    """The numbers of a running program's loader processes."""
    found = [path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    children = [int(child) for part in found for child in part]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
