"""Using a trained model: load it, encode images and texts, compare them."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, PyTree
from ml_collections import ConfigDict
from PIL import Image

from mmjax.config import from_plain
from mmjax.data import image as image_ops
from mmjax.data import text as tokenizers
from mmjax.errors import UserError
from mmjax.models.multimodal import MultimodalModel
from mmjax.sharding import distributed
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import batch_sharding
from mmjax.training import checkpoint

Embeddings = Float[np.ndarray, "rows embed_dim"]
BATCH_SIZE = 256


def compute_dtype(config: ConfigDict) -> np.dtype:
    """The type that the model computes in: bfloat16 on GPU and TPU, float32 on CPU, unless the config says."""
    name = config.precision.compute
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jax.numpy.dtype(name)


def make_module(config: ConfigDict) -> MultimodalModel:
    """The Flax module of a config."""
    return MultimodalModel(FrozenDict(config.model.to_dict()), compute_dtype(config))


class Model:
    """A model with its parameters and tokenizer. Embeddings are float32 of unit norm."""

    def __init__(
        self,
        config: ConfigDict,
        params: PyTree,
        tokenizer: tokenizers.Tokenizer,
        mesh: Mesh,
        step: int = 0,
        on_batch: Callable[[], None] = lambda: None,
    ):
        """`step` is that of the parameters; `on_batch` is called after each batch that is encoded."""
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.step, self._on_batch = step, on_batch
        module = make_module(config)

        def encode(params: PyTree, inputs: jax.Array, modality: str) -> jax.Array:
            return module.apply({"params": params}, modality, inputs, method="encode")["embedding"]

        replicated = NamedSharding(mesh, P())
        self._encode = jax.jit(encode, static_argnames="modality", out_shardings=replicated)
        self._logits = jax.jit(lambda params: module.apply({"params": params}, method="logits"))

    def with_params(self, params: PyTree, step: int) -> "Model":
        """The same model, its compiled functions included, with the parameters of another step."""
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__, params=params, step=step)
        return other

    def encode_image(self, images: Sequence[Any]) -> Embeddings:
        """Encodes file paths, PIL images, or uint8 arrays [height, width, 3] of any size.

        Raises:
          UserError: a file is missing or is no image, or an array has another shape or type.
        """
        encoder = self.config.model.encoders.image

        def load_rows(indices: np.ndarray) -> np.ndarray:
            pixels = (_pixels(images[index]) for index in indices)
            return np.stack([image_ops.for_evaluation(each, encoder.image_size, encoder.resize) for each in pixels])

        return self.encode_rows("image", len(images), load_rows)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        """Encodes texts of any length and language; what exceeds the model's length is cut off."""
        ids = self.tokenizer.encode(list(texts), self.config.model.encoders.text.length)
        return self.encode_rows("text", len(texts), lambda indices: ids[indices])

    def similarity(
        self, image_embeddings: Embeddings, text_embeddings: Embeddings
    ) -> Float[np.ndarray, "images texts"]:
        """Probabilities, as the model's objective defines them.

        A model trained with the sigmoid loss gives each pair its own; one trained with softmax gives
        each image a distribution over the texts.
        """
        with jax.set_mesh(self.mesh):
            learned = jax.device_get(self._logits(self.params))
        logits = learned["logit_scale"] * (image_embeddings @ text_embeddings.T)
        if "sigmoid" in [entry.kind for entry in self.config.objectives.values()]:
            return 1 / (1 + np.exp(-(logits + learned["logit_bias"])))
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    def encode_rows(
        self,
        modality: str,
        count: int,
        load_rows: Callable[[np.ndarray], np.ndarray],
        batch_size: int = BATCH_SIZE,
    ) -> Embeddings:
        """Encodes `count` rows in batches of one shape; every process gets all of the result.

        Args:
          modality: "image" or "text".
          count: how many rows there are.
          load_rows: row numbers -> the encoder's input; each process is asked for its own rows only.
          batch_size: the global batch; the last one is filled up, and what fills it is dropped.
        """
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        batch_size = -(-batch_size // devices) * devices
        sharding = batch_sharding(self.mesh)
        rows = distributed.local_rows(sharding, batch_size)
        parts = [np.zeros((0, self.config.model.embed_dim), np.float32)]
        with jax.set_mesh(self.mesh):
            for start in range(0, count, batch_size):
                local = load_rows(np.minimum(start + rows, count - 1))
                batch = distributed.to_devices({modality: local}, rows, sharding, batch_size)
                encoded = self._encode(self.params, batch[modality], modality=modality)
                parts.append(distributed.replicated_to_host(encoded)[: count - start])
                self._on_batch()
        return np.concatenate(parts)


def load(workdir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> Model:
    """Loads the model of a training run.

    Args:
      workdir: the run's folder.
      step: which checkpoint; the latest by default.
      mesh: where to put it; by default all devices, data-parallel.

    Returns:
      The model, with the averaged parameters where the run keeps an average.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    config = load_config(workdir)
    mesh = mesh or make_mesh()
    steps = checkpoint.saved_steps(workdir)
    found = max(steps, default=None) if step is None else step
    if found not in steps:
        which = "" if step is None else f" of step {step}"
        raise UserError(f"{workdir} has no checkpoint{which}; it has: {', '.join(map(str, steps)) or 'none'}")
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(init_params, config, make_module(config)))
    with checkpoint.Checkpoints(workdir, config, read_only=True) as checkpoints:
        params = checkpoints.restore_params(found, shapes, mesh)
        tokenizer = tokenizers.from_json(checkpoints.restore_tokenizer(found))
    return Model(config, params, tokenizer, mesh, found)


def load_config(workdir: str | Path) -> ConfigDict:
    """The config that a run was started with.

    Raises:
      UserError: the folder holds no run.
    """
    path = Path(workdir) / "config.json"
    try:
        return from_plain(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"{workdir} is no workdir of a run: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def init_params(config: ConfigDict, module: MultimodalModel) -> PyTree:
    """Random parameters; a function of config.seed alone. Call it under jit and a mesh."""
    encoders, devices = config.model.encoders, jax.sharding.get_abstract_mesh()
    rows = devices.shape["data"] * devices.shape["fsdp"]
    size = encoders.image.image_size
    batch = {
        "image": jax.numpy.zeros((rows, size, size, 3), jax.numpy.uint8),
        "text": jax.numpy.ones((rows, encoders.text.length), jax.numpy.int32),
    }
    return module.init(jax.random.key(config.seed), batch)["params"]


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, str | Path):
        return image_ops.load_file(str(image))
    if isinstance(image, Image.Image):
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"an image array is uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels
