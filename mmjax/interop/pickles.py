"""Reading weights that PyTorch has pickled, where a user allows it and torch is there."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.errors import UserError, one_line
from mmjax.interop.tensors import DTYPES, Entry, Tensors

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def read_pickle(path: Path, source: str) -> Tensors:
    """Opens a state dict, alone or under "state_dict" in a training checkpoint, with the loader that runs no code.

    Args:
      path: of the file.
      source: what messages call it.

    Raises:
      UserError: torch is not installed, or it does not read the file, or that holds something else.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{source} is a pickle, which only torch reads, and it is not installed: "
            "`pip install torch`, or convert the file to safetensors where it is"
        ) from error
    try:
        # The format before PyTorch 1.6 is no zip archive, and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of the kinds that torch raises there is no list
        raise UserError(f"{source}: torch does not read it: {one_line(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise UserError(f"{source} holds no state dict")
    return Tensors(source, {_name(name, state): _entry(name, value, source) for name, value in state.items()})


def _name(name: Any, state: dict[Any, Any]) -> str:
    """What DistributedDataParallel puts before all names is taken off."""
    wrapped = all(str(each).startswith("module.") for each in state)
    return str(name).removeprefix("module.") if wrapped else str(name)


def _entry(name: Any, value: Any, source: str) -> Entry:
    import torch

    if not isinstance(value, torch.Tensor):
        raise UserError(f"{source} holds no state dict: {name!r:.200} is a {type(value).__name__}")
    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided or value.device.type != "cpu":
        raise UserError(f"{source}: tensor {name!r:.200} is {value.dtype}, {value.layout}, which is not read")
    return Entry(tuple(value.shape), dtype, _reader(value, dtype))


def _reader(value: Any, dtype: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        import torch

        # As bytes: torch makes no NumPy array of a dtype that NumPy itself has not.
        raw = value.detach().reshape(-1).view(torch.uint8).numpy()
        return raw.view(DTYPES[dtype]).reshape(tuple(value.shape))

    return read
