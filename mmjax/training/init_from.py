"""What a new run takes over from other models: the entries of `config.init_from`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mmjax import api
from mmjax.config import flatten, suggest
from mmjax.data.text import Tokenizer
from mmjax.errors import UserError
from mmjax.interop.family import architecture
from mmjax.models.multimodal import position_grid
from mmjax.models.position import resize
from mmjax.objectives import parts_of
from mmjax.sharding.rules import parameter_shardings, path_name
from mmjax.training.state import TrainState

# Settings of a tower that may differ where its parameters fit: they decide how much it sees, and not what it makes of
# it, or belong to parameters, whose shapes are compared.
_MAY_DIFFER = ("image_size", "max_patches", "positions", "vocab_size", "projection", "projection_bias", "mask_token")
_MAY_DIFFER += ("position_size", "position_interpolation")
_TABLES = ("image/positions/position", "text/embed/position")


class Taken(NamedTuple):
    """Parameters by their paths, and a line for the user about each entry."""

    params: dict[str, Array]
    report: tuple[str, ...] = ()


def taken_over(config: ConfigDict, shapes: PyTree, mesh: Mesh) -> Taken:
    """The parameters that `config.init_from` names; a run's averaged ones where it keeps an average.

    Args:
      config: this run's.
      shapes: of this run's parameters.
      mesh: where to put them.

    Raises:
      UserError: there is no such model or part, two entries take the same parameter, or parameters are missing there,
        have another shape, or are of a tower with other settings, and the entry's `allow` does not name them.
    """
    params: dict[str, Array] = {}
    report = []
    for name, entry in config.init_from.items():
        if not entry.source:
            continue
        try:
            taken, line = _of_entry(entry, config, shapes, mesh)
            if twice := sorted(params.keys() & taken.keys()):
                raise UserError(f"{twice[0]} is taken over by another entry too")
        except UserError as error:
            raise UserError(f"config.init_from.{name}: {error}") from error
        params |= taken
        report.append(f"init_from.{name}: {line}")
    return Taken(params, tuple(report))


def tokenizer_of(config: ConfigDict) -> Tokenizer | None:
    """The tokenizer of the model that the token embeddings are taken from; None where they are not taken."""
    parts = parts_of(config)
    reads_ids = "decoder" in parts and config.model.decoder.reads == "embedding"
    tables = [f"{name}/embed/token_embed/embedding" for name in ("text", *["decoder"] * reads_ids) if name in parts]
    for name, entry in config.init_from.items():
        wanted = [table for table in tables if not entry.parts or table.startswith(tuple(entry.parts))]
        if entry.source and any(not table.startswith(tuple(entry.allow)) for table in wanted):
            try:
                return api.load_tokenizer(entry.source, entry.step or None, entry.revision or None)
            except UserError as error:
                raise UserError(f"config.init_from.{name}: {error}") from error
    return None


def _of_entry(entry: ConfigDict, config: ConfigDict, shapes: PyTree, mesh: Mesh) -> tuple[dict[str, Array], str]:
    own, parts, allowed = _by_path(shapes), tuple(entry.parts), tuple(entry.allow)
    for part in parts:
        if not part or not any(path.startswith(part) for path in own):
            near = suggest(part, sorted({path.split("/")[0] + "/" for path in own}))
            raise UserError(f'parts: no parameter\'s path starts with "{part}"; {near}')
    model = api.load(entry.source, entry.step or None, mesh, entry.revision or None)
    there = _by_path(model.params)
    wanted = {path: leaf for path, leaf in own.items() if not parts or path.startswith(parts)}
    new = [path for path in wanted if allowed and path.startswith(allowed)]
    taken, resized, faults = {}, [], []
    for path in sorted(wanted.keys() - {*new}):
        if path not in there:
            faults.append(f"there is no {path}")
        elif there[path].shape == wanted[path].shape:
            taken[path] = there[path]
        elif (table := _resized(path, there[path], model.config, config, wanted[path].shape)) is not None:
            taken[path] = jax.device_put(table, _sharding(path, shapes, mesh))
            resized.append(f"{path} {[*there[path].shape]} to {[*table.shape]}")
        else:
            faults.append(f"{path} is {[*there[path].shape]} there, and here it is {[*wanted[path].shape]}")
    towers = {path.split("/")[0] for path in taken} & {*config.model.encoders}
    for key, (other, ours) in _differing(model.config, config, towers).items():
        if not key.startswith(allowed or ("\0",)):
            faults.append(f"{key} is {other!r} there, and here it is {ours!r}")
    if faults:
        more = f" (and {len(faults) - 4} more)" if len(faults) > 4 else ""
        raise UserError(f"{entry.source}: {'; '.join(sorted(faults)[:4])}{more}. What is to differ is named in `allow`")
    unused = sorted({path.split("/")[0] for path in there.keys() - taken.keys()})
    line = f"{len(taken)} arrays ({sum(leaf.size for leaf in taken.values()):,} parameters) of {entry.source}"
    line += f"; resized: {', '.join(resized)}" if resized else ""
    line += f"; new here: {', '.join(new)}" if new else ""
    line += f"; left there: {', '.join(unused)}" if unused else ""
    return taken, line


def _resized(
    path: str, table: Array, there: ConfigDict, here: ConfigDict, shape: tuple[int, ...]
) -> Array | np.ndarray | None:
    """A table of positions for another grid of patches or another length; None where it is none, or of another width.

    An image's is interpolated; of a text's the first ones are taken, or all interpolated where there are too few.
    """
    if path not in _TABLES or table.shape[1:] != shape[1:]:
        return None
    if path.startswith("text"):
        if shape[0] <= table.shape[0]:
            return table[: shape[0]]
        return jax.image.resize(table, shape, "linear")
    encoder = there.model.encoders.image
    grids = position_grid(encoder), position_grid(here.model.encoders.image)
    first = table.shape[0] - grids[0][0] ** 2
    if first != shape[0] - grids[1][0] ** 2:
        return None
    return jnp.concatenate([table[:first], resize(table[first:], *grids, encoder.position_interpolation)])


def _differing(there: ConfigDict, here: ConfigDict, towers: set[str]) -> dict[str, tuple[Any, Any]]:
    """The settings of these towers that decide what they compute, and differ: {key: (there, here)}."""
    found = [dict(flatten(architecture(config)["encoders"])) for config in (there, here)]
    keys = [key for key in found[1] if key.split(".")[0] in towers and key.split(".")[1] not in _MAY_DIFFER]
    return {
        f"model.encoders.{key}": (found[0].get(key), found[1][key])
        for key in keys
        if found[0].get(key) != found[1][key]
    }


def _sharding(path: str, shapes: PyTree, mesh: Mesh) -> NamedSharding:
    return _by_path(parameter_shardings(shapes, mesh))[path]


def replacing(make_state: Callable[[], TrainState], taken: Mapping[str, Array]) -> Callable[[], TrainState]:
    """`make_state`, already compiled, with these parameters in place of its own, also in their moving average.

    What is made can be called once: then the parameters that were taken are no longer held beside the state.
    """

    def replace(state: TrainState, taken: Mapping[str, Array]) -> TrainState:
        def of(path: tuple, leaf: Array) -> Array:  # copied, since the first step is given its buffers for good
            return jnp.copy(taken.get(path_name(path), leaf))

        params, ema = (jax.tree_util.tree_map_with_path(of, tree) for tree in (state.params, state.ema))
        return state.replace(params=params, ema=ema)

    def make() -> TrainState:
        state = make_state()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        made = jax.jit(replace, donate_argnums=0, out_shardings=shardings)(state, taken)
        for leaf in taken.values():
            leaf.delete()
        return made

    return make if taken else make_state


def _by_path(tree: PyTree) -> dict[str, Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
