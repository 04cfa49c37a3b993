"""Eight virtual CPU devices for every test; set before jax starts."""

import os
from collections import Counter

# What is compiled here runs for milliseconds: compiling it well would take longer. Programs in processes of their own
# (tests/programs.py) are compiled as users compile them.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from mmjax import files
from mmjax.data import openmoji
from mmjax.sharding.mesh import make_mesh

# Several tests compile the same programs.
jax.config.update("jax_compilation_cache_dir", str(files.cache_root() / "compiled-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_collection_modifyitems(items):
    """Files with many slow tests come first: two processes that share the files then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def openmoji_folder():
    """The embedded data set, built on first use."""
    return openmoji.prepare()


@pytest.fixture
def mesh():
    """A mesh of one device, set for the test."""
    single = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(single):
        yield single
