"""Loading models: pretrained ones, and those of training runs."""

import json
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax.building import init_params, make_module
from mmjax.config import completed, from_plain
from mmjax.data import text as tokenizers
from mmjax.errors import UserError
from mmjax.interop import pretrained
from mmjax.model import LoadRows, Model
from mmjax.quantization import check_weights, quantized
from mmjax.sharding.mesh import make_mesh
from mmjax.training import checkpoint
from mmjax.validation import check_divides

__all__ = ["LoadRows", "Model", "init_params", "is_run", "load", "load_config", "load_tokenizer", "make_module"]


def load(
    source: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    weights: str = "float32",
) -> Model:
    """Loads a pretrained model, or that of a training run.

    Args:
      source: a model's name on the hub, as in "google/siglip-base-patch16-224"; a folder of Hugging Face's or
        open_clip's layout, local or remote; or a run's folder, or one of its checkpoints, `RUN/checkpoints/STEP`.
      step: which checkpoint of a run; the latest by default.
      mesh: where to put it; by default all devices, data-parallel.
      revision: a branch, tag or commit on the hub.
      allow_pickle: also reads weights that are a pickle, with torch's reader that runs no code.
      weights: the type in which the model's matrices are stored, "float32", "bfloat16" or "int8": see
        `mmjax.quantization`. What a run has saved is on the devices in float32 before it is made smaller; of a
        pretrained model one parameter at a time is.

    Returns:
      The model, with the averaged parameters where a run keeps an average.

    Raises:
      UserError: there is no such model, run or checkpoint, its files are damaged or of an unknown family, the mesh
        does not divide the model's parameters, or there are no such weights.
    """
    check_weights(weights)  # before anything is read
    mesh = mesh or make_mesh()
    if is_run(source):
        model = _load_run(source, step, mesh)
        return model.with_params(quantized(model.params, weights, mesh), model.step)
    if step is not None:
        raise UserError(f"{source} is no workdir of a run, so it has no checkpoint of step {step}")
    found = pretrained.load(source, mesh, revision, allow_pickle, weights)
    return Model(found.config, found.params, found.tokenizer, mesh)


def is_run(source: str | Path) -> bool:
    """Whether it is a run's folder, or was to be one: it is there without the files of a pretrained model, or it is
    neither there nor could be a name on the hub.
    """
    path = _run_and_step(source)[0]
    if pretrained.is_folder(path):
        return False
    return path.is_dir() or not pretrained.could_be_elsewhere(source)


def _run_of(source: str | Path, step: int | None) -> tuple[Path, int]:
    """The folder of a run, and which of its checkpoints is meant."""
    workdir, own_step = _run_and_step(source)
    step, steps = own_step if step is None else step, checkpoint.agreed_steps(workdir)
    found = max(steps, default=None) if step is None else step
    if found not in steps:
        which = "" if step is None else f" of step {step}"
        raise UserError(f"{workdir} has no checkpoint{which}; it has: {', '.join(map(str, steps)) or 'none'}")
    return workdir, found


def _load_run(source: str | Path, step: int | None, mesh: Mesh) -> Model:
    config = load_config(source)
    check_divides(config.model, mesh.shape["fsdp"], mesh.shape["tensor"])
    workdir, found = _run_of(source, step)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(init_params, config, make_module(config)))
    with checkpoint.Checkpoints(workdir, config, read_only=True) as checkpoints:
        params = checkpoints.restore_params(found, shapes, mesh)
        tokenizer = _tokenizer_of(checkpoints, found)
    return Model(config, params, tokenizer, mesh, found)


def load_config(source: str | Path, revision: str | None = None) -> ConfigDict:
    """The config of a model, without its parameters; `source` and `revision` as in `load`.

    Raises:
      UserError: there is no such model.
    """
    if not is_run(source):
        return pretrained.load_config(source, revision)
    path = _run_and_step(source)[0] / "config.json"
    try:
        plain = json.loads(path.read_text())
        if not isinstance(plain, dict):
            raise ValueError("it holds no settings")
        return completed(from_plain(plain))
    except OSError as error:
        raise UserError(f"{source} is no workdir of a run: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def load_tokenizer(
    source: str | Path, step: int | None = None, revision: str | None = None
) -> tokenizers.Tokenizer | None:
    """The tokenizer of a model, without its parameters; None where there is none. The arguments are those of `load`.

    Raises:
      UserError: there is no such model.
    """
    if not is_run(source):
        return pretrained.load_tokenizer(source, revision)
    config, (workdir, found) = load_config(source), _run_of(source, step)
    with checkpoint.Checkpoints(workdir, config, read_only=True) as checkpoints:
        return _tokenizer_of(checkpoints, found)


def _tokenizer_of(checkpoints: checkpoint.Checkpoints, step: int) -> tokenizers.Tokenizer | None:
    saved = checkpoints.restore_tokenizer(step)
    return tokenizers.from_json(saved) if saved else None


def _run_and_step(path: str | Path) -> tuple[Path, int | None]:
    path = Path(path).expanduser()
    is_checkpoint = path.parent.name == "checkpoints" and path.name.isdigit() and not (path / "config.json").exists()
    return (path.parent.parent, int(path.name)) if is_checkpoint else (path, None)
