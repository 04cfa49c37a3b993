"""What a new run takes over from another one: `config.init_from`."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mmjax import api
from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.sharding.rules import path_name
from mmjax.training.state import TrainState


def taken_over(init_from: ConfigDict, shapes: PyTree, mesh: Mesh) -> dict[str, Array]:
    """The other run's parameters whose paths start with one of `parts`, by path; averaged ones where it keeps them.

    Args:
      init_from: `config.init_from`; without a workdir nothing is taken.
      shapes: of this run's parameters.
      mesh: where to put them.

    Raises:
      UserError: there is no such run, no such part here, or the parameters there are missing or have other shapes.
    """
    workdir, parts = init_from.workdir, init_from.parts
    if not workdir:
        return {}
    own = _by_path(shapes)
    for part in parts or ("",):
        if not part or not any(path.startswith(part) for path in own):
            near = suggest(part, sorted({path.split("/")[0] + "/" for path in own}))
            raise UserError(f'config.init_from.parts: no parameter\'s path starts with "{part}"; {near}')
    try:
        there = _by_path(api.load(workdir, init_from.step or None, mesh).params)
    except UserError as error:
        raise UserError(f"config.init_from.workdir: {error}") from error
    chosen = {path: leaf.shape for path, leaf in own.items() if path.startswith(tuple(parts))}
    for path, shape in chosen.items():
        if path not in there or there[path].shape != shape:
            found = f"{path} is {[*there[path].shape]}" if path in there else f"there is no {path}"
            raise UserError(f"config.init_from.workdir: in {workdir} {found}, and here it is {[*shape]}")
    return {path: there[path] for path in chosen}


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
