"""The device mesh: one shape for every run, `(data, fsdp, tensor)`."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mmjax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(sizes: Sequence[int], device_count: int) -> tuple[int, int, int]:
    """Fills in the one size that may be -1 so that the product is `device_count`.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sum(size == -1 for size in sizes) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{asked}: sizes are positive, and at most one may be -1 (fill)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and device_count % known == 0:
        return tuple(device_count // known if size == -1 else size for size in sizes)
    if known != device_count:
        raise UserError(f"{asked} does not divide the {device_count} device(s) of this run")
    return tuple(sizes)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given), with `Auto` axes: Linen fails under `Explicit` ones.

    Raises:
      UserError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape((data, fsdp, tensor), len(devices))
    auto = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "cpu":  # no interconnect to lay the axes along
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=auto)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
