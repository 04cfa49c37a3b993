"""Image bytes to fixed-size pixels, for training (random, fast) and for evaluation (exact)."""

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmjax.errors import UserError

cv2.setNumThreads(0)  # the pipeline has its own threads and workers

Pixels = UInt8[np.ndarray, "height width 3"]


def decode(data: bytes) -> Pixels:
    """Decodes an encoded image as RGB; transparency is laid on white.

    Raises:
      UserError: the bytes are no image that OpenCV knows.
    """
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if pixels is None:
        raise UserError(f"{len(data)} bytes cannot be decoded as an image")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.float32) / 255
        pixels = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def resize(pixels: Pixels, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Squashes to a square with Pillow's antialiased bicubic filter: the evaluation path of CLIP and SigLIP."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def random_resized_crop(
    pixels: Pixels, size: int, min_area: float, max_aspect: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """Crops a random window and resizes it to a square ("Going Deeper with Convolutions", 2015, section 6).

    Args:
      pixels: the image.
      size: side of the result, in pixels.
      min_area: the window's least share of the image's area; the largest is 1.
      max_aspect: the window's aspect ratio lies between 1 / max_aspect and max_aspect times the image's.
      rng: decides the window.
    """
    height, width = pixels.shape[:2]
    side = np.sqrt(rng.uniform(min_area, 1.0))
    stretch = np.sqrt(max_aspect ** rng.uniform(-1.0, 1.0))
    window_height = min(height, max(1, round(height * side / stretch)))
    window_width = min(width, max(1, round(width * side * stretch)))
    top = rng.integers(height - window_height + 1)
    left = rng.integers(width - window_width + 1)
    window = pixels[top : top + window_height, left : left + window_width]
    shrinks = window_height >= size and window_width >= size
    return cv2.resize(window, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def mirror(pixels: Pixels) -> Pixels:
    """The image with left and right exchanged."""
    return np.ascontiguousarray(pixels[:, ::-1])


def load_file(path: str) -> Pixels:
    """Reads and decodes an image file.

    Raises:
      UserError: the file cannot be read or is no image.
    """
    try:
        with open(path, "rb") as file:
            return decode(file.read())
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
