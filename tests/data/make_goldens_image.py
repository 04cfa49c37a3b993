"""Writes goldens/image_evaluation.npz: what image processors of transformers make of a few images.

    python -m tests.data.make_goldens_image

Needs `transformers`, `torch` and `torchvision`. The images are not stored: `picture` draws the same ones again.
"""

from pathlib import Path

import numpy as np

from mmjax.data.image import Fit

GOLDENS = Path(__file__).with_name("goldens") / "image_evaluation.npz"
# Height, width, size: portrait and landscape, shrunk and enlarged, odd sides and odd margins, and one that fits.
CASES = ((97, 131, 32), (150, 83, 31), (21, 30, 40), (37, 20, 33), (32, 32, 32), (32, 47, 32), (9, 200, 16))


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def wider(size: int) -> int:
    """The side of which 7/8 are kept, as DINOv2 keeps 224 of 256 pixels."""
    return size * 8 // 7


# How images are read by the processors of these names, in transformers' words and in ours.
READ = {
    "CLIP": lambda size: (
        {"size": {"shortest_edge": size}, "crop_size": square(size)},
        Fit(size, "center_crop"),
    ),
    "Siglip": lambda size: ({"size": square(size)}, Fit(size)),
    "Blip": lambda size: ({"size": square(size)}, Fit(size)),
    "ViT": lambda size: ({"size": square(size)}, Fit(size, resample="bilinear")),
    "Beit": lambda size: (
        {"size": square(wider(size)), "do_center_crop": True, "crop_size": square(size), "resample": 2},
        Fit(size, resample="bilinear", crop_fraction=size / wider(size)),
    ),
    "Bit": lambda size: (  # DINOv2's
        {"size": {"shortest_edge": wider(size)}, "crop_size": square(size)},
        Fit(size, "center_crop", crop_fraction=size / wider(size)),
    ),
}


def picture(height: int, width: int) -> np.ndarray:
    """A smooth image with some noise and hard edges; uint8 [height, width, 3]."""
    rng = np.random.default_rng(height * 1000 + width)
    rows, columns = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(rows * a + columns * b) for a, b in rng.uniform(-0.3, 0.3, (3, 2))]
    pixels = np.stack(waves, axis=-1) + rng.integers(-20, 21, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = 255, 0, 60
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def import_torchvision():
    """Imports what transformers needs. Some wheels bring operators for another build of torch; none is used here."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision
    return torchvision


def processed(name: str, pixels: np.ndarray, size: int, backend: str = "Pil") -> np.ndarray:
    """uint8 [size, size, 3] from the processor of a name in READ, without its normalisation."""
    import transformers
    from PIL import Image

    make = getattr(transformers, f"{name}ImageProcessor{backend}")
    processor = make(do_normalize=False, do_rescale=False, **READ[name](size)[0])
    (result,) = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    return result.transpose(1, 2, 0).astype(np.uint8)


def main() -> None:
    import_torchvision()
    arrays = {}
    for height, width, size in CASES:
        pixels = picture(height, width)
        for name in READ:
            arrays[f"{name}_{height}x{width}"] = processed(name, pixels, size)
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == "__main__":
    main()
