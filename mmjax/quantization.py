"""Smaller weights for inference: bfloat16, or eight-bit integers."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.models.quantized import QuantizedArray
from mmjax.sharding.rules import parameter_shardings, path_name

WEIGHTS = ("float32", "bfloat16", "int8")
LARGEST = 127  # symmetric about 0: -128 is not used
# The ends of the paths of what is made smaller -> the axis of its inputs, over which the largest value is taken.
# Biases, normalisations, positions and single vectors are few, and stay float32.
INPUT_AXES = {"kernel": -2, "embedding": -1, "vocab": -1}


def quantized(params: PyTree[Float[Array, "..."]], weights: str, mesh: Mesh) -> PyTree[Array | QuantizedArray]:
    """Parameters whose matrices are stored in a smaller type; what a model computes in stays as its config says.

    "int8" keeps of each output of a dense layer, and of each token of an embedding table, the weights w as
    round(127 w / max|w|), and max|w| / 127 in float32: absmax quantisation ("LLM.int8()", Dettmers et al. 2022, section
    2) with a constant for each column of the weights (section 3.1). Only weights are integers, and not, as there, what
    they are multiplied with. There is no gradient with respect to such parameters.

    Args:
      params: float32, as `mmjax.building.init_params` makes them.
      weights: one of `WEIGHTS`.
      mesh: the integers lie on it as the float32 parameters do.

    Returns:
      A tree like `params`; with "int8" there is a `QuantizedArray` in place of each matrix.

    Raises:
      UserError: `weights` is another name.
    """
    check_weights(weights)

    def place(path: tuple, value: Array, sharding: NamedSharding) -> Array | QuantizedArray:
        return quantized_parameter(path_name(path), value, sharding, weights)

    return jax.tree_util.tree_map_with_path(place, params, parameter_shardings(params, mesh))


def quantized_parameter(
    path: str, value: Float[Array, "*shape"], sharding: NamedSharding, weights: str
) -> Float[Array, "*shape"] | QuantizedArray:
    """One parameter of `quantized`, so that the float32 ones need not all be there at once."""
    axis = _input_axis(path, value.ndim)
    return value if axis is None or weights == "float32" else _smaller(value, weights, axis, sharding)


def check_weights(weights: str) -> None:
    """Raises UserError where `weights` is none of `WEIGHTS`."""
    if weights not in WEIGHTS:
        raise UserError(f'weights: unknown type "{weights}"; {suggest(str(weights), WEIGHTS)}')


def _input_axis(path: str, rank: int) -> int | None:
    """The axis of a matrix over its inputs; None for other parameters, kernels of convolutions among them."""
    matrix_rank = 3 if "/blocks/" in path else 2  # stacked over the layers
    return INPUT_AXES.get(path.rpartition("/")[2]) if rank == matrix_rank else None


@partial(jax.jit, static_argnames=("weights", "axis", "sharding"))
def _smaller(
    x: Float[Array, "*shape"], weights: str, axis: int, sharding: NamedSharding
) -> Float[Array, "*shape"] | QuantizedArray:
    constrain = jax.lax.with_sharding_constraint
    if weights == "bfloat16":
        return constrain(x.astype(jnp.bfloat16), sharding)
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    spec[axis] = None
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / LARGEST
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return QuantizedArray(constrain(values, sharding), constrain(scale, NamedSharding(sharding.mesh, P(*spec))))
