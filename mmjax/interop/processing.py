"""How Hugging Face's `preprocessor_config.json` says that images are read, and how ours does."""

from collections.abc import Mapping
from typing import Any

from mmjax.errors import UserError

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def read(processor: Mapping[str, Any], size: int, default: Mapping[str, Any], any_size: bool = False) -> dict[str, Any]:
    """The settings of `mmjax.config.image_encoder` that say how an image is read.

    Args:
      processor: the file's content, {} where there is none.
      size: of the images that the model was made for, in pixels.
      default: what holds where the file is silent. A size there that is one number means what this `resize` does.
      any_size: the model also reads images of another size, if the file says so.

    Raises:
      UserError: the images are read in a way that ours are not.
    """
    found, processor = dict(default), {key: value for key, value in processor.items() if value is not None}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in processor:
            values = processor[theirs]
            found[ours] = tuple(float(value) for value in (values if isinstance(values, list) else [values] * 3))
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not processor.get(step, True):
            raise UserError(f"preprocessor_config.json: {step} is off, and a model here always does it")
    if abs(255 * processor.get("rescale_factor", 1 / 255) - 1) > 1e-3:
        raise UserError(f"preprocessor_config.json: rescale_factor is {processor['rescale_factor']}, and here 1/255")
    if "resample" in processor:
        if processor["resample"] not in _RESAMPLE:
            raise UserError(
                f"preprocessor_config.json: resample {processor['resample']} is neither bilinear nor bicubic"
            )
        found["resample"] = _RESAMPLE[processor["resample"]]
    found |= _sizes(processor, size, found["resize"] == "center_crop")
    if found["image_size"] != size and not any_size:
        raise UserError(f"preprocessor_config.json: images of {found['image_size']} pixels for a model of {size}")
    return found


def _sizes(processor: Mapping[str, Any], default: int, crops: bool) -> dict[str, Any]:
    """To what an image is resized, and what is cut out of it."""
    resized = processor.get("size", default)
    keeps_shape = "shortest_edge" in resized if isinstance(resized, Mapping) else crops
    side = cut = _side(resized)
    if processor.get("do_center_crop", crops):
        cut = _side(processor.get("crop_size", default))
    elif keeps_shape:
        raise UserError("preprocessor_config.json: images keep their shape, and a model here reads squares")
    if cut > side:
        raise UserError(f"preprocessor_config.json: {cut} pixels cannot be cut out of {side}")
    return {"image_size": cut, "resize": "center_crop" if keeps_shape else "squash", "crop_fraction": cut / side}


def write(encoder: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The content of a `preprocessor_config.json`; `kind` is the name of the class in transformers."""
    size, keeps_shape = encoder["image_size"], encoder["resize"] != "squash"
    resized, crops = int(size / encoder["crop_fraction"] + 1e-6), keeps_shape or encoder["crop_fraction"] < 1
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resized} if keeps_shape else {"height": resized, "width": resized},
        "resample": {ours: theirs for theirs, ours in _RESAMPLE.items()}[encoder["resample"]],
        "do_center_crop": crops,
        **({"crop_size": {"height": size, "width": size}} if crops else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder["mean"]),
        "image_std": list(encoder["std"]),
    }


def _side(size: Any) -> int:
    """The side of a square, or the shorter side, in any of the ways in which these files have been written.

    Raises:
      UserError: it is another kind of size.
    """
    sides = size if isinstance(size, list) else [size]
    if isinstance(size, Mapping):
        sides = [*size.values()] if {*size} in ({"shortest_edge"}, {"height", "width"}) else []
    if len({*sides}) != 1 or not isinstance(sides[0], int) or sides[0] < 1:
        raise UserError(f"preprocessor_config.json: a size of {size} is neither that of a square nor of a shorter side")
    return sides[0]
