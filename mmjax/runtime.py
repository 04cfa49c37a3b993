"""Process-wide settings that have to be made before jax computes anything."""

import ctypes
import os

import jax

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def configure() -> None:
    """Sets up the compilation cache and, where the CPU computes, the allocator and the vector width.

    Measured on two cores with the quickstart's model: a step takes 0.20 s with these settings and
    0.28 s without (`benchmarks/cpu_settings.py`).
    """
    from mmjax.data.openmoji import cache_root

    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    # XLA uses 256-bit vectors by default, also where the CPU has 512-bit ones.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_prefer_vector_width" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512".strip()
    if jax.default_backend() == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Makes glibc keep what XLA frees after each step.

    By default it goes back to the kernel, and every step faults it in again, page by page: 80,000
    faults and a quarter of the time of the quickstart's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl, not on macOS
    if mallopt:
        mallopt(_M_ARENA_MAX, 1)  # other arenas would map large blocks whatever the limits say
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
