"""Sizes of the named Transformer variants.

Ti, S, B, L, H: "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021, table 1) and "Training
data-efficient image transformers" (Touvron et al. 2021, table 1). M, g, G: "Scaling Vision
Transformers" (Zhai et al. 2022, table 2). So400m: "Getting ViT in Shape" (Alabdulmohsin et al. 2023).
"""

from typing import NamedTuple

from mmjax.errors import UserError


class Size(NamedTuple):
    """The dimensions of one Transformer tower."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


SIZES = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
}


def parse(variant: str) -> tuple[Size, int]:
    """Splits "B/16" into the size of B and the patch size 16; the patch size of plain "B" is 0.

    Raises:
      UserError: the name is unknown or the patch size is not a positive whole number.
    """
    name, slash, patch = variant.partition("/")
    if name not in SIZES:
        raise UserError(f"unknown variant {variant!r}; sizes are {', '.join(SIZES)}, written like B/16")
    if slash and (not patch.isdecimal() or int(patch) == 0):
        raise UserError(f"variant {variant!r}: the patch size after the slash is not a positive whole number")
    return SIZES[name], int(patch) if slash else 0
