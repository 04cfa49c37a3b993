"""Images to patch tokens."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8


def normalize(
    image: UInt8[Array, "*shape 3"], mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype
) -> Float[Array, "*shape 3"]:
    """Pixels from 0..255 to (pixel / 255 - mean) / std, by channel. On the device, so that hosts ship bytes."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in (mean, std))
    return ((image.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


class PatchEmbed(nn.Module):
    """Cuts an image into square patches, row by row, and projects each one (Dosovitskiy et al. 2021, eq. 1).

    What is left over on the right and at the bottom is not seen: SigLIP's largest model has images of 384 pixels and
    patches of 14. Takes patches that are cut already, too, their values in the order of rows, columns and channels.

    Raises:
      ValueError: the image is smaller than a patch.
    """

    patch: int
    width: int
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width 3"] | Float[Array, "batch tokens values"]
    ) -> Float[Array, "batch tokens embed"]:
        patches = self._cut(image) if image.ndim == 4 else image
        return nn.Dense(self.width, self.use_bias, dtype=self.dtype, name="patch_embed")(patches)

    def _cut(self, image: Array) -> Float[Array, "batch tokens values"]:
        batch, height, width, channels = image.shape
        rows, columns = height // self.patch, width // self.patch
        if not rows or not columns:
            raise ValueError(f"an image of {height}x{width} cannot be cut into patches of {self.patch}")
        whole = image[:, : rows * self.patch, : columns * self.patch]
        patches = whole.reshape(batch, rows, self.patch, columns, self.patch, channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
