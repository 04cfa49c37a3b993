"""Reading a pretrained model's folder of Hugging Face or open_clip, and writing one."""

import json
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mmjax.building import init_params, make_module
from mmjax.config import suggest
from mmjax.data import text as tokenizers
from mmjax.errors import UserError, one_line
from mmjax.files import write_atomically
from mmjax.interop import store, table, tokenizer_files
from mmjax.interop.family import TENSORS, Family, Json, check_same
from mmjax.interop.registry import FAMILIES, FILES, family_of
from mmjax.quantization import quantized_parameter
from mmjax.sharding.rules import parameter_shardings
from mmjax.validation import check_divides

_PROCESSOR = "preprocessor_config.json"


class Pretrained(NamedTuple):
    """A model as it comes from its folder; there need be no tokenizer, to encode ids with."""

    config: ConfigDict
    params: PyTree[Array]
    tokenizer: tokenizers.Tokenizer | None
    family: str


def load(
    source: str | Path,
    mesh: Mesh,
    revision: str | None = None,
    allow_pickle: bool = False,
    weights: str = "float32",
) -> Pretrained:
    """Loads a model of a family that is known.

    It warns where the folder does not say how images or recordings are prepared, as a part of one in the hub's cache.

    Args:
      source: a folder, a name on the hub, or a remote folder: see `store.find`.
      mesh: where its parameters go.
      revision: a branch, tag or commit of the hub.
      allow_pickle: also reads weights that are a pickle, with torch.
      weights: the type of its matrices: see `mmjax.quantization`.

    Raises:
      UserError: it cannot be found or read, its family is unknown, or its tensors are not those of its config.
    """
    folder = store.find(source, revision, allow_pickle)
    tensors = _tensors_of(folder, allow_pickle)
    family, config = _config_of(folder, {TENSORS: tensors.names()})
    check_divides(config.model, mesh.shape["fsdp"], mesh.shape["tensor"])
    try:
        rows, shapes = family.table(config), shapes_of(config, mesh)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        sizes = f"{folder.name}: the sizes in {family.settings} do not fit each other"
        raise UserError(f"{sizes}: {one_line(error)}") from error
    table.check(rows, shapes, tensors, folder.name, family.name)
    finish = partial(quantized_parameter, weights=weights)
    params = table.read(rows, tensors, shapes, parameter_shardings(shapes, mesh), folder.name, finish)
    return Pretrained(config, params, _tokenizer_of(folder, config), family.name)


def load_config(source: str | Path, revision: str | None = None) -> ConfigDict:
    """The config of a model, as `load` gives it."""
    folder = store.find(source, revision)
    return _config_of(folder, {TENSORS: _tensors_of(folder).names()})[1]


def load_tokenizer(source: str | Path, revision: str | None = None) -> tokenizers.Tokenizer | None:
    """The tokenizer of a model, as `load` gives it."""
    folder = store.find(source, revision)
    return _tokenizer_of(folder, _config_of(folder)[1])


def is_folder(path: Path) -> bool:
    """Whether a pretrained model lies there, and not a run, whose config.json has objectives."""
    try:
        found = json.loads((path / "config.json").read_text())
    except (ValueError, RecursionError):
        return False
    except OSError:
        found = {}
    return (
        isinstance(found, dict)
        and "objectives" not in found
        and any((path / family.settings).is_file() for family in FAMILIES.values())
    )


def could_be_elsewhere(source: str | Path) -> bool:
    """Whether it is the address of a remote folder, or could be a name on the hub, "owner/name" or "owner/name@tag"."""
    return "://" in str(source) or re.fullmatch(r"[\w.-]*\w/[\w.-]+(@[\w./-]+)?", str(source)) is not None


def _tensors_of(folder: store.Folder, allow_pickle: bool = False) -> store.Tensors:
    return store.open_tensors(folder, allow_pickle, family_of(folder)[0].weights)


def _config_of(folder: store.Folder, tensors: Mapping[str, Json] | None = None) -> tuple[Family, ConfigDict]:
    family, theirs = family_of(folder)
    files = _files_of(folder)
    try:
        config = family.to_config(theirs, files | (tensors or {}))
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder.name}: {family.settings} is no {family.name} model's: {one_line(error)}") from error
    if not files[_PROCESSOR] and _PROCESSOR in family.files(config):
        guess = f"what it encodes is prepared as for most models of the family {family.name}"
        warnings.warn(f"{folder.name} has no {_PROCESSOR}: {guess}", stacklevel=2)
    return family, config


def _files_of(folder: store.Folder) -> dict[str, Json]:
    """The files that families read. What a processor saves by itself, transformers 5 saves inside the file of all."""
    files = {name: folder.read_json(name, optional=True, kind=kind) for name, kind in FILES.items()}
    inside = (files["processor_config.json"].get(name) for name in ("image_processor", "feature_extractor"))
    files[_PROCESSOR] = next(filter(None, inside), files[_PROCESSOR])
    return files


def _tokenizer_of(folder: store.Folder, config: ConfigDict) -> tokenizers.Tokenizer | None:
    family, theirs = family_of(folder)
    return family.read_tokenizer(folder, theirs) if "text" in config.model.encoders else None


def save(
    folder: Path, config: ConfigDict, params: PyTree, tokenizer: tokenizers.Tokenizer | None, family: str = ""
) -> str:
    """Writes a model as a folder of another library.

    Args:
      folder: a new or empty one.
      config, params, tokenizer: the model's.
      family: which kind of folder; by default the one whose models have this config.

    Returns:
      The family.

    Raises:
      UserError: no family has this model, the folder is not empty or cannot be written.
    """
    chosen = _fitting(config, family)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty")
    settings = chosen.to_theirs(config)
    if tokenizer is not None:
        settings = chosen.name_tokenizer(settings, tokenizer)
    files = {chosen.settings: settings, **chosen.files(config)}
    contents = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    if tokenizer is not None:
        contents |= tokenizer_files.contents(tokenizer, config.model.encoders.text.length, chosen.name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)
    store.save_tensors(folder / chosen.weights, table.write(chosen.table(config), _as_computed(config, params)))
    store.write_checksums(folder)
    return chosen.name


def _as_computed(config: ConfigDict, params: PyTree) -> PyTree:
    """The parameters with the logit scale that the model computes with: there it has no upper bound."""
    most = config.model.max_logit_scale
    if not most or "logit_scale" not in params:
        return params
    return {**params, "logit_scale": np.minimum(params["logit_scale"], np.log(most, dtype=np.float32))}


def _fitting(config: ConfigDict, name: str) -> Family:
    if name and name not in FAMILIES:
        raise UserError(f"unknown family {name!r}; {suggest(name, FAMILIES)}")
    refusals = []
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        try:
            names = dict.fromkeys(row.theirs for row in family.table(config).rows)
            files = {**family.files(config), TENSORS: names}
            check_same(family.name, config, family.to_config(family.to_theirs(config), files))
            return family
        except UserError as error:
            refusals.append(str(error))
        except (AttributeError, KeyError) as error:  # a tower or part that this model lacks
            refusals.append(f"this is no model of the family {family.name}: it has no {one_line(error)}")
    raise UserError(min(refusals, key=len))


def shapes_of(config: ConfigDict, mesh: Mesh) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes of a model's parameters."""
    with jax.set_mesh(mesh):
        return jax.eval_shape(partial(init_params, config, make_module(config)))
