"""Eight virtual CPU devices for every test; set before jax starts."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from mmjax import files
from mmjax.data import openmoji
from mmjax.sharding.mesh import make_mesh

# Several tests compile the same programs.
jax.config.update("jax_compilation_cache_dir", str(files.cache_root() / "compiled-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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
