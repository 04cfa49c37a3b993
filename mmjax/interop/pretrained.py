"""Reading a pretrained model's folder of Hugging Face or open_clip, and writing one."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mmjax.building import init_params, make_module
from mmjax.config import suggest
from mmjax.data import text as tokenizers
from mmjax.errors import UserError, one_line
from mmjax.files import write_atomically
from mmjax.interop import store, table, tokenizer_files
from mmjax.interop.family import Family, check_same
from mmjax.interop.registry import FAMILIES, FILES, family_of
from mmjax.sharding.rules import parameter_shardings
from mmjax.validation import check_divides


class Pretrained(NamedTuple):
    """A model as it comes from its folder; there need be no tokenizer, to encode ids with."""

    config: ConfigDict
    params: PyTree[Array]
    tokenizer: tokenizers.Tokenizer | None
    family: str


def load(source: str | Path, mesh: Mesh, revision: str | None = None, allow_pickle: bool = False) -> Pretrained:
    """Loads a model of a family that is known.

    Args:
      source: a folder, a name on the hub, or a remote folder: see `store.find`.
      mesh: where its parameters go.
      revision: a branch, tag or commit of the hub.
      allow_pickle: also reads weights that are a pickle, with torch.

    Raises:
      UserError: it cannot be found or read, its family is unknown, or its tensors are not those of its config.
    """
    folder = store.find(source, revision, allow_pickle)
    family, theirs = family_of(folder)
    try:
        config = family.to_config(theirs, {name: folder.read_json(name, optional=True) for name in FILES})
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder.name}: {family.settings} is no {family.name} model's: {one_line(error)}") from error
    check_divides(config.model, mesh.shape["fsdp"], mesh.shape["tensor"])
    tokenizer = family.read_tokenizer(folder, theirs) if "text" in config.model.encoders else None
    rows = family.table(config)
    tensors = table.Renamed(store.open_tensors(folder, allow_pickle), rows.aliases)
    shapes = shapes_of(config, mesh)
    table.check(rows, shapes, tensors, folder.name, family.name)
    params = table.read(rows, tensors, shapes, parameter_shardings(shapes, mesh), folder.name)
    return Pretrained(config, params, tokenizer, family.name)


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
    folder.mkdir(parents=True, exist_ok=True)
    settings = chosen.to_theirs(config)
    if tokenizer is not None:
        settings = chosen.name_tokenizer(settings, tokenizer)
    for name, content in {chosen.settings: settings, **chosen.files(config)}.items():
        write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    if tokenizer is not None:
        tokenizer_files.write(folder, tokenizer, config.model.encoders.text.length, chosen.name)
    store.save_tensors(folder / chosen.weights, table.write(chosen.table(config), params))
    store.write_checksums(folder)
    return chosen.name


def _fitting(config: ConfigDict, name: str) -> Family:
    if name and name not in FAMILIES:
        raise UserError(f"unknown family {name!r}; {suggest(name, FAMILIES)}")
    refusals = []
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        try:
            check_same(family.name, config, family.to_config(family.to_theirs(config), family.files(config)))
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
