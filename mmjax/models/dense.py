"""The matrix product of the Transformer's dense layers."""

from typing import Any

import jax
from jaxtyping import Array, Float


def product(x: Float[Array, "*rows inputs"], kernel: Float[Array, "inputs outputs"], *how: Any, **more: Any) -> Array:
    """`jax.lax.dot_general` as `nn.Dense` calls it; on a CPU with a gradient of the kernel that costs less.

    XLA transposes one factor of that gradient, which jax writes as gradient times input: 10 ms for the outputs of an
    MLP's first layer, a sixth of the MLP. Here it is the narrower of the two (docs/performance.md). There is no
    forward-mode derivative then.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, kernel, *how, **more)
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    over_rows = ((rows, rows), ((), ()))
    if x.shape[-1] <= gradient.shape[-1]:
        of_kernel = jax.lax.dot_general(x, gradient, over_rows)
    else:
        of_kernel = jax.lax.dot_general(gradient, x, over_rows).T
    return gradient @ kernel.T, of_kernel


_product.defvjp(_forward, _backward)
