"""The state of training: one pytree, and how it lies on the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from mmjax.sharding.rules import RULES, AxisRules, logical_axes, parameter_shardings, path_name
from mmjax.training import health


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    `ema` is the moving average of `params`, or {} where the config asks for none.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: optax.OptState
    ema: PyTree
    health: health.Health


def make_state(
    init_params: Callable[[], PyTree], optimizer: optax.GradientTransformation, with_ema: bool
) -> TrainState:
    """The state before the first step. Run it under jit, with the shardings below as its output's."""
    params = init_params()
    ema = jax.tree.map(jnp.copy, params) if with_ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, health.new())


def state_shardings(state: TrainState, mesh: Mesh, rules: AxisRules = RULES) -> TrainState:
    """A sharding for each leaf of the state (arrays or shapes).

    An optimizer statistic with its parameter's shape lies like the parameter; anything else (a
    count, a factored second moment) is replicated.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}

    def statistic(path, leaf) -> NamedSharding:
        keys = path_name(path).split("/")
        tails = ("/".join(keys[start:]) for start in range(len(keys)))
        name = next((tail for tail in tails if tail in shapes), None)
        if name is None or leaf.shape != shapes[name]:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, rules.parameter_spec(logical_axes(name)))

    return TrainState(
        step=NamedSharding(mesh, P()),
        params=parameter_shardings(state.params, mesh, rules),
        opt_state=jax.tree_util.tree_map_with_path(statistic, state.opt_state),
        ema=parameter_shardings(state.ema, mesh, rules),
        health=jax.tree.map(lambda _: NamedSharding(mesh, P()), state.health),
    )


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes that say where their arrays are to lie: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )
