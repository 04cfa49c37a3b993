"""How Hugging Face's `preprocessor_config.json` says that images are read, and how ours does."""

from collections.abc import Mapping
from typing import Any

from mmjax.errors import UserError

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def read(processor: Mapping[str, Any], size: int, default: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `mmjax.config.image_encoder` that say how an image is read.

    Args:
      processor: the file's content, {} where there is none.
      size: of the images that the model was made for, in pixels.
      default: what holds where the file is silent.

    Raises:
      UserError: the images are read in a way that ours are not.
    """
    found = dict(default) | {"image_size": size}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in processor:
            values = processor[theirs]
            found[ours] = tuple(float(value) for value in (values if isinstance(values, list) else [values] * 3))
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not processor.get(step, True):
            raise UserError(f"preprocessor_config.json: {step} is off, and a model here always does it")
    if "resample" in processor:
        if processor["resample"] not in _RESAMPLE:
            raise UserError(
                f"preprocessor_config.json: resample {processor['resample']} is neither bilinear nor bicubic"
            )
        found["interpolation"] = _RESAMPLE[processor["resample"]]
    if "size" in processor or "do_center_crop" in processor:
        found["resize"] = "center_crop" if processor.get("do_center_crop", "crop_size" in processor) else "squash"
    cut = _side(processor.get("crop_size", size) if found["resize"] == "center_crop" else processor.get("size", size))
    if cut != size:
        raise UserError(f"preprocessor_config.json: images of {cut} pixels for a model of {size}")
    return found


def write(encoder: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The content of a `preprocessor_config.json`; `kind` is the name of the class in transformers."""
    size, crops = encoder["image_size"], encoder["resize"] == "center_crop"
    square = {"height": size, "width": size}
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if crops else square,
        "resample": {ours: theirs for theirs, ours in _RESAMPLE.items()}[encoder["interpolation"]],
        "do_center_crop": crops,
        **({"crop_size": square} if crops else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder["mean"]),
        "image_std": list(encoder["std"]),
    }


def _side(size: Any) -> int:
    """The side of a square, in any of the ways in which these files have been written."""
    if isinstance(size, Mapping):
        return int(size.get("shortest_edge") or size.get("height") or 0)
    return int(size[0] if isinstance(size, list) else size)
