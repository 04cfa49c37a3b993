"""Process-wide settings that have to be made before jax starts."""

import ctypes
import gc
import importlib.util
import os
import time
from functools import cache
from importlib.metadata import entry_points

STARTED = time.time()  # of the program: before jax is imported

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def configure() -> None:
    """Sets Python's garbage collector, the compilation cache and, where the CPU computes, the allocator and the vector
    width.

    Call it before jax touches a device: memory pools and flags are fixed then.
    `benchmarks/cpu_settings.py` measures what the CPU's settings are worth.
    """
    gc.set_threshold(100_000)  # imports and tracing allocate a lot and leave little garbage
    if _computes_on_cpu():
        _keep_freed_memory()
    configure_jax()


def configure_jax() -> None:
    """The part of `configure` that leaves the process as it is, for `mmjax.load` in a program of somebody else's.

    A compilation cache that is set already stays.
    """
    # XLA uses 256-bit vectors by default, also where the CPU has 512-bit ones.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_prefer_vector_width" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512".strip()
    import jax

    from mmjax.files import cache_root

    if jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
    # What compiles in a second by itself may take two on a busy machine, and many small programs add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if _computes_on_cpu():
        # The place of what XLA tunes for GPUs is part of every key: in a folder that was moved nothing would be found.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@cache
def _computes_on_cpu() -> bool:
    """Whether jax will find nothing but the CPU, asked without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


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
