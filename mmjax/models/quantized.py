"""Eight-bit integers with their scales, which stand where a module expects a parameter."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Int8


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=())
@dataclass(frozen=True)
class QuantizedArray:
    """The array `values * scale`; along an axis where `scale` has the size 1, values share one.

    Flax turns a parameter into a jax array of the type that it computes in right where it is used, and that is where
    this one becomes floats: under a scan over stacked layers one layer at a time. So no module needs to know of it.
    """

    values: Int8[Array, "*shape"]
    scale: Float[Array, "*#shape"]

    def __jax_array__(self) -> Float[Array, "*shape"]:
        """The floats, of the scale's type."""
        return self.values.astype(self.scale.dtype) * self.scale

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """That of the floats."""
        return self.scale.dtype

    def astype(self, dtype: DTypeLike) -> Float[Array, "*shape"]:
        """The floats, of this type."""
        return jnp.asarray(self).astype(dtype)

    def take(self, indices: Int[Array, "*indices"], axis: int) -> "QuantizedArray":
        """The entries along an axis, as `jax.Array.take`; the rest does not become floats."""
        own = jnp.zeros_like(indices) if self.scale.shape[axis] == 1 else indices
        return QuantizedArray(self.values.take(indices, axis), self.scale.take(own, axis))
