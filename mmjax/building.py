"""From a config to its Flax module and its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mmjax.models import variants
from mmjax.models.multimodal import MultimodalModel, audio_samples
from mmjax.objectives import parts_of


def compute_dtype(config: ConfigDict) -> np.dtype:
    """The type that the model computes in: bfloat16 on GPU and TPU, float32 on CPU, unless the config says."""
    name = config.precision.compute
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_module(config: ConfigDict) -> MultimodalModel:
    """The Flax module of a config: the parts of the model that its objectives read, and those of `model.parts`."""
    parallel = any(entry.get("parallel", 0.0) > 0 for entry in config.objectives.values())
    settings = FrozenDict(config.model.to_dict())
    return MultimodalModel(settings, compute_dtype(config), parts_of(config), parallel)


def init_params(config: ConfigDict, module: MultimodalModel) -> PyTree:
    """Random parameters; a function of config.seed alone. Call it under jit and a mesh."""
    encoders, devices = config.model.encoders, jax.sharding.get_abstract_mesh()
    rows, batch = devices.shape["data"] * devices.shape["fsdp"], {}
    if "image" in encoders:
        batch["image"] = _blank(encoders.image, rows)
    if "text" in encoders:
        batch["text"] = jnp.ones((rows, encoders.text.length), jnp.int32)
    if "audio" in encoders:
        batch["audio"] = jnp.zeros((rows, audio_samples(encoders.audio)), jnp.float32)
    return module.init(jax.random.key(config.seed), batch)["params"]


def _blank(encoder: ConfigDict, rows: int) -> PyTree[Array]:
    if encoder.max_patches:
        values = 3 * variants.parse(encoder.variant)[1] ** 2
        patches = jnp.zeros((rows, encoder.max_patches, values), jnp.uint8)
        return {"patches": patches, "shape": jnp.ones((rows, 2), jnp.int32)}
    return jnp.zeros((rows, encoder.image_size, encoder.image_size, 3), jnp.uint8)
