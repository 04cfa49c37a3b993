"""Where a program runs: the machine, its devices, and the versions of what is installed."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mmjax import __version__
from mmjax.files import write_atomically

FILE = "environment.json"
PACKAGES = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "grain": "grain",
    "numpy": "numpy",
}
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS")  # what changes how jax computes


def machine_and_versions(packages: Mapping[str, str]) -> dict[str, str | int]:
    """The machine, its cores, Python, and the versions of those packages that are installed.

    Args:
      packages: the name to show -> the name of the distribution.
    """
    found = {"machine": _processor(), "cores": os.cpu_count() or 1, "python": platform.python_version()}
    for name, distribution in packages.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(workdir: Path) -> None:
    """Writes `environment.json`: the environment of a run's latest session, from the first process alone."""
    import jax  # whoever only reads a run does not need it

    if jax.process_index() != 0:
        return
    content = {
        "command": shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "mmjax": __version__,
        **machine_and_versions(PACKAGES),
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }
    content |= {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    write_atomically(workdir / FILE, (json.dumps(content, indent=1) + "\n").encode("utf-8", "replace"))


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.system()} {platform.machine()} {names[0] if names else platform.processor()}".strip()
