"""Writes goldens/image_evaluation.npz: what transformers' CLIP and SigLIP processors make of a few images.

    python -m tests.data.make_goldens_image

Needs `transformers`, `torch` and `torchvision`. The images are not stored: `picture` draws the same ones again.
"""

from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).with_name("goldens") / "image_evaluation.npz"
# Height, width, size: portrait and landscape, shrunk and enlarged, odd sides and odd margins, and one that fits.
CASES = ((97, 131, 32), (150, 83, 31), (21, 30, 40), (37, 20, 33), (32, 32, 32), (32, 47, 32), (9, 200, 16))


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


def processed(name: str, pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3] from the processor of that class name, without its normalisation."""
    import transformers
    from PIL import Image

    if name.startswith("CLIP"):
        sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    else:
        sizes = {"size": {"height": size, "width": size}}
    processor = getattr(transformers, name)(do_normalize=False, do_rescale=False, **sizes)
    (result,) = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    return result.transpose(1, 2, 0).astype(np.uint8)


def main() -> None:
    import_torchvision()
    arrays = {}
    for height, width, size in CASES:
        pixels = picture(height, width)
        arrays[f"center_crop_{height}x{width}"] = processed("CLIPImageProcessorPil", pixels, size)
        arrays[f"squash_{height}x{width}"] = processed("SiglipImageProcessorPil", pixels, size)
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **arrays)


if __name__ == "__main__":
    main()
