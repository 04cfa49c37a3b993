"""Exports an encoder as one file that jax runs without mmjax: a StableHLO program with its parameters.

    python -m mmjax.export --model=runs/quickstart --modality=image --out=image.npz
    python -m mmjax.export --model=runs/quickstart --modality=text --out=text.npz --platforms=cuda,tpu
    python -m mmjax.export --model=google/siglip-base-patch16-224 --modality=image --out=image.npz --weights=int8

--model is what `mmjax.load` takes. Beside image.npz it writes image.json: what goes in and what comes out, how inputs
are made, the tokenizer. docs/inference.md shows how the file is used.
Exit codes: 0 done, 2 a mistake in the flags.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from mmjax import __version__, cli
from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.files import replacing, write_atomically

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ANYWHERE = ("cpu", "cuda", "tpu")
DTYPES = ("float32", "bfloat16")
PROGRAM = "program"  # the name of the serialized program among the arrays of the file


def encoder(
    model: Any,
    modality: str,
    path: str | Path,
    platforms: Sequence[str] = ANYWHERE,
    batch_size: int | None = None,
    compute: str = "auto",
) -> dict[str, Any]:
    """Writes the encoder of a modality to a file, and beside it, with the ending .json, what its user has to know.

    The file is one of NumPy's: `program`, the bytes of `jax.export`'s serialization, and every parameter under its
    path. The program takes the parameters, as one dictionary, and the input, and returns embeddings, float32 and of
    unit norm. It runs on one device. The parameters are no part of it: as constants of the program they would be
    compiled with it, several times as slowly and in several times the memory (benchmarks/exported.py).

    Args:
      model: a `mmjax.api.Model`, in one process. Its parameters are written as they are: float32, bfloat16 or int8.
      modality: "image", "text" or "audio".
      path: of the file, which has to end in .npz; what is there is replaced.
      platforms: where the program can run: some of "cpu", "cuda", "rocm" and "tpu".
      batch_size: that of every call; None leaves it open, and a call of another size compiles again.
      compute: the type that it computes in, "float32" or "bfloat16"; "auto" is what the model's config says, and where
        that says "auto" too, float32 if the CPU is among the platforms.

    Returns:
      The content of the JSON file.

    Raises:
      UserError: an argument is none of these, the model has no such encoder, or the files cannot be written.
    """
    check(modality, path, platforms, batch_size, compute)
    path = Path(path)
    model.needs_encoder(modality)
    if compute == "auto":
        compute = model.config.precision.compute
    if compute == "auto":
        compute = "float32" if "cpu" in platforms else "bfloat16"
    tower = _Tower.of(model, modality, compute)
    description = _describe(model, tower, platforms, batch_size)
    arrays = {PROGRAM: np.frombuffer(tower.program(platforms, batch_size), np.uint8), **tower.arrays}
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        write_atomically(path.with_suffix(".json"), (json.dumps(description, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return description


def check(modality: str, path: str | Path, platforms: Sequence[str], batch_size: int | None, compute: str) -> None:
    """Raises UserError where an argument of `encoder` is wrong whatever the model is."""
    if modality not in INPUTS:
        raise UserError(f'modality: unknown "{modality}"; {suggest(modality, INPUTS)}')
    if not str(path).endswith(".npz") or "://" in str(path):
        raise UserError(f"{path}: the file to write has to be a local one that ends in .npz")
    if not Path(path).parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {Path(path).parent}")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f'platforms: unknown "{platform}"; {suggest(platform, PLATFORMS)}')
    if not platforms or len(set(platforms)) < len(platforms):
        raise UserError(f"platforms: {','.join(platforms) or 'none'}: name one or more, each once")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not positive")
    if compute not in ("auto", *DTYPES):
        raise UserError(f'compute: unknown type "{compute}"; {suggest(compute, DTYPES)}')


Shape = tuple[int | str, ...]


class Input(NamedTuple):
    """What an encoder reads: an array or a dictionary of arrays, the shape of a row and the type of each, and how it is
    made. A size that is left open has a name; `largest` says how large it may be.
    """

    arrays: tuple[Shape, str] | dict[str, tuple[Shape, str]]
    reading: dict[str, Any]
    largest: Mapping[str, int] = {}

    def map(self, make: Callable[[Shape, str], Any]) -> Any:
        """The same structure, of what is made of each array's row shape and type."""
        if isinstance(self.arrays, dict):
            return {name: make(*array) for name, array in self.arrays.items()}
        return make(*self.arrays)


def _image(model: Any) -> Input:
    from mmjax.data.image_reader import Reader

    reader = Reader.of(model.config.model.encoders.image)
    if reader.max_patches:
        arrays = {"patches": ((reader.max_patches, reader.patch**2 * 3), "uint8"), "shape": ((2,), "int32")}
        return Input(arrays, reader._asdict())
    return Input(((reader.image_size, reader.image_size, 3), "uint8"), reader._asdict())


def _text(model: Any) -> Input:
    from mmjax.models.multimodal import ignores_padding

    settings = model.config.model.encoders.text
    tokenizer = None if model.tokenizer is None else model.tokenizer.to_json()
    reading = {"length": settings.length, "pad_id": settings.pad_id, "tokenizer": tokenizer}
    if ignores_padding(settings):
        return Input((("length",), "int32"), reading, {"length": settings.length})
    return Input(((settings.length,), "int32"), reading)


def _audio(model: Any) -> Input:
    from mmjax.models.multimodal import audio_samples

    settings = model.config.model.encoders.audio
    reading = {"sample_rate": settings.sample_rate, "seconds": settings.seconds, "channels": 1, "range": [-1, 1]}
    return Input(((audio_samples(settings),), "float32"), reading)


INPUTS: Mapping[str, Callable[[Any], Input]] = {"image": _image, "text": _text, "audio": _audio}


class _Tower(NamedTuple):
    """An encoder: its Flax module, the paths and types of its parameters, these as NumPy has them, and its input."""

    module: Any
    tree: Any
    types: dict[str, np.dtype]
    arrays: dict[str, np.ndarray]
    modality: str
    input: Input

    @classmethod
    def of(cls, model: Any, modality: str, compute: str) -> "_Tower":
        import jax

        from mmjax.sharding.rules import path_name

        # Its own parameters, and the two numbers that belong to every model.
        parts = (modality, f"{modality}_projection", "logit_scale", "logit_bias")
        params = {name: part for name, part in model.params.items() if name in parts}
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        values = {path_name(path): jax.device_get(leaf) for path, leaf in leaves}
        arrays = {name: value.view(np.uint16) if _is_bfloat16(value) else value for name, value in values.items()}
        module = model.module.clone(dtype=np.dtype(compute))
        types = {name: value.dtype for name, value in values.items()}
        return cls(module, tree, types, arrays, modality, INPUTS[modality](model))

    def program(self, platforms: Sequence[str], batch_size: int | None) -> bytes:
        """`jax.export`'s serialization of `__call__`."""
        import jax
        import jax.export

        from mmjax.models.attention import portable
        from mmjax.sharding.mesh import make_mesh

        scope = jax.export.SymbolicScope([f"{name} <= {size}" for name, size in self.input.largest.items()])

        def typed(shape: Shape, dtype: str) -> jax.ShapeDtypeStruct:
            sizes = ", ".join(map(str, (batch_size or "batch", *shape)))
            return jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes, scope=scope), dtype)

        parameters = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in self.arrays.items()}
        inputs = self.input.map(typed)
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])), portable():
            exported = jax.export.export(jax.jit(self.encode), platforms=platforms)(parameters, inputs)
        return bytes(exported.serialize())

    def encode(self, parameters: Mapping[str, Any], inputs: Any) -> Any:
        """The embeddings, float32 [batch, embed_dim]."""
        import jax

        leaves = [
            jax.lax.bitcast_convert_type(parameters[name], dtype) if dtype.name == "bfloat16" else parameters[name]
            for name, dtype in self.types.items()
        ]
        variables = {"params": self.tree.unflatten(leaves)}
        return self.module.apply(variables, self.modality, inputs, method="features")["embedding"].astype(np.float32)


def _is_bfloat16(array: np.ndarray) -> bool:
    """Whether it is of the type that NumPy's files have no name for: its bits go there as integers."""
    return array.dtype.name == "bfloat16"


def _describe(model: Any, tower: _Tower, platforms: Sequence[str], batch_size: int | None) -> dict[str, Any]:
    """The content of the JSON file."""
    import jax

    config, batch = model.config, batch_size or "batch"
    found = {
        "format": 1,
        "modality": tower.modality,
        "input": tower.input.map(lambda shape, dtype: {"shape": [batch, *shape], "dtype": dtype}),
        "output": {"shape": [batch, config.model.embed_dim], "dtype": "float32", "norm": 1},
        "platforms": [*platforms],
        "compute": tower.module.dtype.name,
        "weights": sorted({dtype.name for dtype in tower.types.values()}),
        "parameter_bytes": sum(array.nbytes for array in tower.arrays.values()),
        "step": model.step,
        "jax": jax.__version__,
        "mmjax": __version__,
    }
    if len(config.model.encoders) > 1:  # loss(logit_scale * cosine + logit_bias) is a probability
        kinds = [entry.kind for entry in config.objectives.values()]
        found["similarity"] = {**model.logits(), "loss": "sigmoid" if "sigmoid" in kinds else "softmax"}
    return found | {"reading": tower.input.reading}


def main() -> int:
    """Exports as the flags say; returns the exit code."""
    given = flags.FLAGS
    for name in ("model", "modality", "out"):
        if not given[name].value:
            raise UserError(
                f"--{name} is missing; for a start: --model=runs/quickstart --modality=image --out=image.npz"
            )
    path, batch_size = given.out, given.batch_size or None
    check(given.modality, path, given.platforms, batch_size, given.compute)
    from mmjax import runtime

    runtime.configure()
    import jax

    from mmjax import api
    from mmjax.sharding.mesh import make_mesh

    model = api.load(given.model, mesh=make_mesh(devices=jax.devices()[:1]), weights=given.weights)
    found = encoder(model, given.modality, path, given.platforms, batch_size, given.compute)
    takes, gives = (_shown(found[end]) for end in ("input", "output"))
    size, where = found["parameter_bytes"] / 1e6, ", ".join(given.platforms)
    print(f"{path}: {takes} -> {gives}, {size:,.1f} MB of parameters, for {where}")
    return 0


def _shown(arrays: Mapping[str, Any]) -> str:
    """An array or several, of the description, as in "uint8 [batch, 60, 60, 3]"."""
    if "dtype" not in arrays:
        return ", ".join(f"{name} {_shown(array)}" for name, array in arrays.items())
    return f"{arrays['dtype']} [{', '.join(map(str, arrays['shape']))}]"


def _define_flags() -> None:
    """Only for the program: who imports this module has flags of its own."""
    flags.DEFINE_string("model", None, "what `mmjax.load` takes: a run, a folder, a name on the hub")
    flags.DEFINE_string("modality", None, "which encoder: image, text or audio")
    flags.DEFINE_string("out", None, "the file to write, NAME.npz; NAME.json goes beside it")
    flags.DEFINE_list("platforms", [*ANYWHERE], "where it can run, of cpu, cuda, rocm and tpu")
    flags.DEFINE_integer("batch_size", 0, "of every call; 0 leaves it open")
    flags.DEFINE_string("compute", "auto", "the type that it computes in, float32 or bfloat16")
    flags.DEFINE_string("weights", "float32", "the type in which matrices are stored: float32, bfloat16 or int8")
    flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")


if __name__ == "__main__":
    _define_flags()
    sys.exit(cli.run(main, __doc__))
