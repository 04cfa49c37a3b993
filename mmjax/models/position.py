"""Position embeddings: learned, 2-D sine-cosine and relative ones, and how they follow a change of resolution."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mmjax.sharding.rules import constrain

POSITIONS = ("learned", "sincos2d", "none")
RELATIVE_POSITIONS = ("", "shared", "layer")
INTERPOLATIONS = ("antialiased", "bicubic")


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
    table: Float[Array, "tokens width"],
    old: tuple[int, int],
    new: tuple[int, int],
    interpolation: str = "antialiased",
) -> Float[Array, "new_tokens width"]:
    """Interpolates a learned table from one grid of patches to another.

    Bicubic both ways: "antialiased", or "bicubic" without that and with PyTorch's kernel, as DINOv2 was evaluated.
    """
    if old == new:
        return table
    grid = table.reshape(*old, table.shape[-1])
    if interpolation == "bicubic":
        rows, columns = (bicubic_weights(*lengths) for lengths in zip(old, new, strict=True))
        return jnp.einsum("rh,cw,hwd->rcd", rows, columns, grid, precision="highest").reshape(-1, table.shape[-1])
    return jax.image.resize(grid, (*new, table.shape[-1]), "cubic").reshape(-1, table.shape[-1])


def bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """What each of `old` values on a line weighs in each of `new` values in their stead.

    As by `torch.nn.functional.interpolate` without `align_corners` and `antialias`: the kernel of "Cubic convolution
    interpolation for digital image processing" (Keys 1981, equation 4) with a = -0.75; the outermost value is repeated
    beyond the edge.
    """
    places, weights = (np.arange(new) + 0.5) * old / new - 0.5, np.zeros((new, old))
    for offset in range(-1, 3):
        neighbours = np.floor(places) + offset
        distance = np.abs(places - neighbours)
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        clipped = np.clip(neighbours, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), clipped), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


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

    `kind` is in POSITIONS. `grid` is the one that the parameters are made for; another grid at call time interpolates
    them, as `interpolation` (in INTERPOLATIONS) says; so do the grids [batch, 2] of images that have each their own.
    """

    kind: str
    grid: tuple[int, int]
    class_token: bool = False
    interpolation: str = "antialiased"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], grid: tuple[int, int] | Int[Array, "batch 2"]
    ) -> Float[Array, "batch tokens width"]:
        width, first = x.shape[-1], int(self.class_token)
        if self.kind == "none":
            return x
        if self.kind == "sincos2d":
            table = jnp.pad(sincos_2d(grid, width), ((first, 0), (0, 0)))
        else:
            init = nn.initializers.normal(width**-0.5)
            table = self.param("position", init, (first + self.grid[0] * self.grid[1], width))
            if isinstance(grid, tuple):
                table = jnp.concatenate([table[:first], resize(table[first:], self.grid, grid, self.interpolation)])
            else:
                table = resize_each(table, self.grid, grid, x.shape[1])
        return x + table.astype(x.dtype)


class Relative(NamedTuple):
    """A grid of patches that relative positions are between, and whether a class token comes before them."""

    grid: tuple[int, int]
    class_token: bool = False

    def places(self) -> int:
        """How many relative positions there are: 3 more with a class token."""
        rows, columns = self.grid
        return (2 * rows - 1) * (2 * columns - 1) + 3 * self.class_token

    def index(self) -> Int[np.ndarray, "tokens tokens"]:
        """The number of the relative position from each token to each other.

        Those of patches go by rows, then columns, the query's place less the key's, from the least up. Then come: from
        the class token to a patch, from a patch to it, and from it to itself.
        """
        rows, columns = self.grid
        y, x = (axis.ravel() for axis in np.indices(self.grid))
        down, right = (np.subtract.outer(axis, axis) for axis in (y, x))
        index = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
        if not self.class_token:
            return index
        index, last = np.pad(index, ((1, 0), (1, 0))), self.places() - 1
        index[0], index[:, 0], index[0, 0] = last - 2, last - 1, last
        return index


class RelativePosition(nn.Module):
    """A bias of self-attention that each head learns for each relative position of two tokens ("Swin Transformer", Liu
    et al. 2021, section 3.2), as BEiT has it.
    """

    relative: Relative
    heads: int

    @nn.compact
    def __call__(self) -> Float[Array, "1 heads tokens tokens"]:
        table = self.param("bias_table", nn.initializers.normal(0.02), (self.relative.places(), self.heads))
        return constrain(table[self.relative.index()].transpose(2, 0, 1)[None], None, "heads", None, None)
