"""The image towers of SigLIP as timm names them: open_clip's settings have a name in place of sizes."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from mmjax.errors import UserError
from mmjax.interop.table import PATCHES, TOKEN, Row, dense, fused, norm
from mmjax.models.variants import SIZES, Size

_SIZES = {
    "base": SIZES["B"],
    "large": SIZES["L"],
    "so400m": SIZES["So400m"],
    "giantopt": Size(1536, 40, 6144, 16),
}
# Size and patch -> the sides of images, in pixels. timm computes GELU as SigLIP does, by its approximation, for some
# of the models alone.
_EXACT_GELU = {
    ("base", 16): (224, 256, 384, 512),
    ("large", 16): (256, 384),
    ("so400m", 14): (224, 378, 384),
}
_APPROXIMATE_GELU = {
    ("base", 32): (256,),
    ("large", 16): (512,),
    ("so400m", 16): (256, 384, 512),
    ("giantopt", 16): (256, 384),
}


class Trunk(NamedTuple):
    """What a name stands for; `activation` as in `mmjax.config.image_encoder`."""

    size: Size
    patch: int
    image_size: int
    activation: str


def _trunks() -> Iterator[tuple[str, Trunk]]:
    for activation, known in (("gelu", _EXACT_GELU), ("gelu_tanh", _APPROXIMATE_GELU)):
        for (size, patch), sides in known.items():
            for side in sides:
                yield f"vit_{size}_patch{patch}_siglip_{side}", Trunk(_SIZES[size], patch, side, activation)


TRUNKS = dict(_trunks())


def trunk_of(name: str) -> Trunk:
    """The tower of a timm model; what follows a full stop in its name says which weights.

    Raises:
      UserError: it is none of SigLIP's.
    """
    known = TRUNKS.get(re.sub(r"\..*", "", name))
    if known is None:
        raise UserError(f"timm_model_name: {name!r} is none of SigLIP's image towers, and others of timm are not read")
    return known


def name_of(trunk: Trunk) -> str:
    """The name of a tower.

    Raises:
      UserError: timm has no such model.
    """
    for name, known in TRUNKS.items():
        if known == trunk:
            return name
    raise UserError(f"timm has no SigLIP model of {trunk}, and open_clip keeps such a tower by its name in timm alone")


def rows(trunk: str) -> Iterator[Row]:
    """The rows of an image tower, whose tensors' names begin with `trunk`."""
    blocks, pool = f"{trunk}.blocks.{{}}", f"{trunk}.attn_pool"
    yield from (
        Row("image/patches/patch_embed/kernel", f"{trunk}.patch_embed.proj.weight", PATCHES),
        Row("image/patches/patch_embed/bias", f"{trunk}.patch_embed.proj.bias"),
        Row("image/positions/position", f"{trunk}.pos_embed", TOKEN),
        *norm("image/transformer/blocks/norm1", f"{blocks}.norm1"),
        *fused("image/transformer/blocks/attention", f"{blocks}.attn.qkv"),
        *dense("image/transformer/blocks/attention/out", f"{blocks}.attn.proj"),
        *norm("image/transformer/blocks/norm2", f"{blocks}.norm2"),
        *dense("image/transformer/blocks/mlp/up", f"{blocks}.mlp.fc1"),
        *dense("image/transformer/blocks/mlp/down", f"{blocks}.mlp.fc2"),
        *norm("image/transformer/norm", f"{trunk}.norm"),
        Row("image/pool/probe", f"{pool}.latent", TOKEN),
        *dense("image/pool/attention/query", f"{pool}.q"),
        *fused("image/pool/attention", f"{pool}.kv", names=("key", "value")),
        *dense("image/pool/attention/out", f"{pool}.proj"),
        *norm("image/pool/norm", f"{pool}.norm"),
        *dense("image/pool/mlp/up", f"{pool}.mlp.fc1"),
        *dense("image/pool/mlp/down", f"{pool}.mlp.fc2"),
    )
