"""Position embeddings: learned and 2-D sine-cosine, and how they follow a change of resolution."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int


def sincos_2d(grid: tuple[int, int], width: int) -> Float[np.ndarray, "tokens width"]:
    """Fixed 2-D embedding, as in MoCo v3 (Chen et al. 2021, section 4.3): half for x, half for y.

    Raises:
      ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine position embeddings need a width divisible by 4, not {width}")
    frequencies = 1.0 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1 or 1))
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    x_angles, y_angles = (np.outer(axis.ravel(), frequencies) for axis in (x, y))
    parts = (np.sin(x_angles), np.cos(x_angles), np.sin(y_angles), np.cos(y_angles))
    return np.concatenate(parts, axis=1).astype(np.float32)


def resize(
    table: Float[Array, "tokens width"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "new_tokens width"]:
    """Interpolates a learned table from one grid of patches to another (bicubic, antialiased)."""
    if old == new:
        return table
    grid = table.reshape(*old, table.shape[-1])
    return jax.image.resize(grid, (*new, table.shape[-1]), "cubic").reshape(-1, table.shape[-1])


def resize_each(
    table: Float[Array, "tokens width"], old: tuple[int, int], shapes: Int[Array, "batch 2"], count: int
) -> Float[Array, "batch count width"]:
    """Interpolates a learned table to a grid of its own for each image (bilinear, antialiased), row by row.

    Places from the grid's end up to `count` have some embedding. Only values depend on the shapes, so one program
    serves all of them. The same as PyTorch's `interpolate` with `antialias` and without `align_corners`, to rounding.
    """
    places, columns = jnp.arange(count), jnp.maximum(shapes[:, 1:], 1)
    rows = triangles(places // columns, shapes[:, :1], old[0])
    columns = triangles(places % columns, shapes[:, 1:], old[1])
    return jnp.einsum("bnr,bnc,rcw->bnw", rows, columns, table.reshape(*old, -1), precision="highest")


def triangles(
    places: Int[Array, "batch count"], sizes: Int[Array, "batch 1"], old: int
) -> Float[Array, "batch count old"]:
    """What each of `old` values on a line weighs at these places of the same line with `sizes` values in their stead.

    A triangle around the place, as wide as two of the old values, or two of the new ones where these are fewer.
    """
    scale = old / sizes[..., None]
    center = (places[..., None] + 0.5) * scale - 0.5
    weights = jnp.maximum(1 - jnp.abs(jnp.arange(old) - center) / jnp.maximum(scale, 1), 0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-9)  # none far beyond the end


class ImagePosition(nn.Module):
    """Adds the embedding of each patch's place in the grid, and one of the class token where there is one.

    `grid` is the one that the parameters are made for; another grid at call time interpolates them, and so do the
    grids [batch, 2] of images that have each their own.
    """

    kind: str
    grid: tuple[int, int]
    class_token: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], grid: tuple[int, int] | Int[Array, "batch 2"]
    ) -> Float[Array, "batch tokens width"]:
        width, first = x.shape[-1], int(self.class_token)
        if self.kind == "sincos2d":
            table = jnp.pad(sincos_2d(grid, width), ((first, 0), (0, 0)))
        else:
            init = nn.initializers.normal(width**-0.5)
            table = self.param("position", init, (first + self.grid[0] * self.grid[1], width))
            if isinstance(grid, tuple):
                table = jnp.concatenate([table[:first], resize(table[first:], self.grid, grid)])
            else:
                table = resize_each(table, self.grid, grid, x.shape[1])
        return x + table.astype(x.dtype)
