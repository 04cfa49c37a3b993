"""The teacher that some objectives read: the run's own moving average, or the model of another run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree, UInt8
from ml_collections import ConfigDict

from mmjax import api
from mmjax.data.text import Tokenizer
from mmjax.errors import UserError
from mmjax.models.multimodal import MultimodalModel
from mmjax.models.outputs import Outputs, Vocabulary
from mmjax.objectives import parts_read, reads_teacher
from mmjax.training import checkpoint

OWN_AVERAGE = "ema"


@dataclass(frozen=True)
class Teacher:
    """Makes a teacher's outputs; `params` are those of another run's model, {} for the run's own moving average."""

    module: MultimodalModel
    params: PyTree
    image_size: int
    vocabulary: Vocabulary | None

    def of(self, params: PyTree) -> Callable[[Mapping[str, Array]], Outputs]:
        """A function from batches to the teacher's outputs: nothing is dropped, and no gradient goes back."""
        params = jax.lax.stop_gradient(params)

        def outputs(batch: Mapping[str, Array]) -> Outputs:
            seen = {name: batch[name] for name in ("image", "text") if name in batch}
            if "image" in seen:
                seen["image"] = resized(seen["image"], self.image_size)
            return Outputs(self.module, params, seen, vocabulary=self.vocabulary)

        return outputs


def resized(image: UInt8[Array, "batch height width 3"], size: int) -> UInt8[Array, "batch size size 3"]:
    """Images at a teacher's size."""
    if image.shape[1] == size:
        return image
    pixels = jax.image.resize(image.astype(jnp.float32), (image.shape[0], size, size, 3), "linear")
    return jnp.round(pixels).clip(0, 255).astype(jnp.uint8)


def resolve(config: ConfigDict, workdir: Path, resumed: bool) -> None:
    """Writes into the config which checkpoint of the teacher's run "the latest" is; a resumed run keeps to its own."""
    source = config.teacher.source
    if not reads_teacher(config.objectives) or source == OWN_AVERAGE or config.teacher.step:
        return
    if resumed and (workdir / "config.json").exists():
        before = api.load_config(workdir).get("teacher", {})
        if before.get("source") == source:
            config.teacher.step = before["step"]
            return
    config.teacher.step = max(checkpoint.agreed_steps(source), default=0)


def make_teacher(
    config: ConfigDict, module: MultimodalModel, mesh: Mesh, tokenizer: Tokenizer, vocabulary: Vocabulary | None
) -> Teacher | None:
    """The teacher of a config; None where no objective reads one.

    Raises:
      UserError: the run that it is to come from is missing, has another tokenizer, or lacks what is read of it.
    """
    if not reads_teacher(config.objectives):
        return None
    source = config.teacher.source
    if source == OWN_AVERAGE:
        return Teacher(module, {}, config.model.encoders.image.image_size, vocabulary)
    try:
        model = api.load(Path(source), config.teacher.step or None, mesh)
    except UserError as error:
        raise UserError(f"config.teacher.source: {error}") from error
    read = parts_of_teacher(config)
    if {"text", "masked"} & read and model.tokenizer.to_json() != tokenizer.to_json():
        raise UserError(f"config.teacher.source: {source} was trained with another tokenizer than this run")
    missing = read - set(model.module.parts)
    if missing:
        raise UserError(f"config.teacher.source: the model of {source} has no {sorted(missing)[0]}")
    own, other = config.model.encoders.text, model.config.model.encoders.text
    keys = ("length", "vocab_size") if "masked" in read else ("length",) if "text" in read else ()
    for key in keys:
        if own[key] != other[key]:
            raise UserError(
                f"config.model.encoders.text.{key}: {own[key]} is not the {other[key]} of the teacher {source}"
            )
    return Teacher(model.module, model.params, model.config.model.encoders.image.image_size, vocabulary)


def parts_of_teacher(config: ConfigDict) -> set[str]:
    """The parts of the teacher that the config's objectives read."""
    readers = [entry for entry in config.objectives.values() if reads_teacher({"": entry})]
    return {part for entry in readers for part in parts_read(entry, config.model)}
