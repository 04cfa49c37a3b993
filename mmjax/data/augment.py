"""What happens to a training image on its way from encoded bytes to a square of fixed size.

The window is chosen from the header alone, so that a JPEG is decoded no larger than the window needs. Colours change
as torchvision's `ColorJitter` changes them; the further operations are those of "RandAugment: Practical automated data
augmentation with a reduced search space" (Cubuk et al., 2020), section 3, in the ranges that torchvision gives them.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from mmjax.data import image as images
from mmjax.data.image import Pixels

Window = tuple[int, int, int, int]  # top, left, height, width, in pixels

_TRIES = 10  # of the inception crop, before it takes the middle
_WINDOW_DRAWS = 4 * _TRIES
_COLOR_DRAWS = 7  # whether, in which order, four strengths, grey
_ORDERS = tuple(itertools.permutations(range(4)))
_FILL = (128, 128, 128)  # what a moved image leaves bare
_LARGEST_MAGNITUDE = 30
_LINEAR_UP_TO, _BLURRED_UP_TO, _DOUBLED_UP_TO = 1.4, 2.3, 3.0  # window to result


@dataclass(frozen=True)
class Augment:
    """Crops, resizes, mirrors and recolours; all choices come from `rng`, so they are a function of the element.

    Attributes:
      size: side of the result, in pixels.
      resize: how the window is chosen, a name in RESIZES.
      crop_min_area: least share of the image's area that a random window has; the largest is 1.
      crop_max_aspect: a random window's width to height lies between 1 / crop_max_aspect and crop_max_aspect: as a
        multiple of the image's for `random_crop`, on its own for `inception_crop`.
      mirror: probability of exchanging left and right, where the record allows it.
      color_jitter: strengths of brightness, contrast, saturation (0 to 1) and hue (0 to 0.5).
      color_jitter_probability: how often colours are jittered at all.
      grayscale: probability of losing the colours.
      rand_augment_layers: how many operations of RAND_AUGMENT are applied, one after the other.
      rand_augment_magnitude: their strength, 0 to 30.
    """

    size: int
    resize: str = "random_crop"
    crop_min_area: float = 0.8
    crop_max_aspect: float = 1.0
    mirror: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    color_jitter_probability: float = 0.8
    grayscale: float = 0.0
    rand_augment_layers: int = 0
    rand_augment_magnitude: int = 10

    def __call__(
        self, image: bytes | Pixels, may_mirror: bool, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "size size 3"]:
        """Augments an encoded or a decoded image.

        Raises:
          RecordError: the bytes are no image.
        """
        # All numbers are drawn, needed or not: an element keeps its window whatever else is switched on.
        draws = rng.random(_WINDOW_DRAWS + 1 + _COLOR_DRAWS + 2 * self.rand_augment_layers).tolist()
        of_window, of_mirror, further = draws[:_WINDOW_DRAWS], draws[_WINDOW_DRAWS], draws[_WINDOW_DRAWS + 1 :]
        height, width = images.header_size(image) if isinstance(image, bytes) else image.shape[:2]
        window = RESIZES[self.resize](height, width, self, of_window)
        pixels = _resize(_cut(image, height, width, window, self.size), self.size)
        if may_mirror and of_mirror < self.mirror:
            pixels = images.mirror(pixels)
        pixels = _recolor(pixels, self, further[:_COLOR_DRAWS])
        return _rand_augment(pixels, self.rand_augment_magnitude, further[_COLOR_DRAWS:])


def _random_crop(height: int, width: int, augment: Augment, draws: Sequence[float]) -> Window:
    """A window with about the image's own shape."""
    side = math.sqrt(_between(augment.crop_min_area, 1.0, draws[0]))
    stretch = math.sqrt(augment.crop_max_aspect ** (2 * draws[1] - 1))
    window_height = min(height, max(1, round(height * side / stretch)))
    window_width = min(width, max(1, round(width * side * stretch)))
    return _placed(height, width, window_height, window_width, draws[2:])


def _inception_crop(height: int, width: int, augment: Augment, draws: Sequence[float]) -> Window:
    """A window of any place, area and shape ("Going Deeper with Convolutions", 2015, section 6).

    What does not fit into the image is drawn again; in the end it is the largest window in the middle whose shape is
    allowed, as torchvision's `RandomResizedCrop` has it.
    """
    largest = augment.crop_max_aspect
    for start in range(0, _WINDOW_DRAWS, 4):
        area = height * width * _between(augment.crop_min_area, 1.0, draws[start])
        aspect = largest ** (2 * draws[start + 1] - 1)
        window_height, window_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < window_height <= height and 0 < window_width <= width:
            return _placed(height, width, window_height, window_width, draws[start + 2 :])
    window_height = min(height, max(1, round(width * largest)))
    window_width = min(width, max(1, round(height * largest)))
    return _placed(height, width, window_height, window_width, (0.5, 0.5))


def _center_crop(height: int, width: int, augment: Augment, draws: Sequence[float]) -> Window:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _squash(height: int, width: int, augment: Augment, draws: Sequence[float]) -> Window:
    return 0, 0, height, width


RESIZES: dict[str, Callable[[int, int, Augment, Sequence[float]], Window]] = {
    "random_crop": _random_crop,
    "inception_crop": _inception_crop,
    "center_crop": _center_crop,
    "squash": _squash,
}


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


def _placed(height: int, width: int, window_height: int, window_width: int, draws: Sequence[float]) -> Window:
    top = int(draws[0] * (height - window_height + 1))
    left = int(draws[1] * (width - window_width + 1))
    return top, left, window_height, window_width


def _cut(image: bytes | Pixels, height: int, width: int, window: Window, size: int) -> Pixels:
    """The window's pixels; a JPEG is decoded at the least size that leaves it `size` a side."""
    top, left, window_height, window_width = window
    if isinstance(image, bytes):
        least = -(-height * size // window_height), -(-width * size // window_width)
        image = images.decode(image, least, quick=window_height > size and window_width > size)
    rows = _scaled(top, window_height, height, image.shape[0])
    columns = _scaled(left, window_width, width, image.shape[1])
    return image[rows, columns]


def _scaled(start: int, length: int, whole: int, reduced: int) -> slice:
    """The part of a side that was `whole` pixels long and has been reduced."""
    length = max(1, round(length * reduced / whole))
    start = min(round(start * reduced / whole), reduced - length)
    return slice(start, start + length)


def _resize(window: Pixels, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes fast, without aliasing.

    OpenCV averages areas slowly unless their ratio is a whole number. So a window of about twice the size is blurred a
    little and then interpolated, which differs least from Pillow's antialiased bilinear filter; one of up to three
    times the size is interpolated to exactly twice the size, which skips no pixel, and then halved.
    """
    height, width = window.shape[:2]
    ratio = max(height, width) / size
    if ratio <= 1:
        return cv2.resize(window, (size, size), interpolation=cv2.INTER_CUBIC)
    if ratio <= _LINEAR_UP_TO:
        return cv2.resize(window, (size, size), interpolation=cv2.INTER_LINEAR)
    if ratio <= _BLURRED_UP_TO:
        blurred = cv2.GaussianBlur(window, (3, 3), 0, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(blurred, (size, size), interpolation=cv2.INTER_LINEAR)
    if ratio <= _DOUBLED_UP_TO:
        doubled = cv2.resize(window, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
        return cv2.resize(doubled, (size, size), interpolation=cv2.INTER_AREA)
    shrunk = cv2.resize(window, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    return shrunk if shrunk.shape[:2] == (size, size) else _resize(shrunk, size)


def _recolor(pixels: Pixels, augment: Augment, draws: Sequence[float]) -> Pixels:
    if draws[0] < augment.color_jitter_probability:
        for index in _ORDERS[int(draws[1] * len(_ORDERS))]:
            strength = augment.color_jitter[index]
            if strength:
                pixels = _JITTERS[index](pixels, _between(max(-1.0, -strength), strength, draws[2 + index]))
    if draws[6] < augment.grayscale:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return pixels


def _brighten(pixels: Pixels, change: float) -> Pixels:
    """Adds `change` times the distance from black."""
    return _mapped(pixels, np.arange(256) * (1 + change))


def _contrast(pixels: Pixels, change: float) -> Pixels:
    """Adds `change` times the distance from the image's mean grey."""
    mean = cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0]
    return _mapped(pixels, mean + (np.arange(256) - mean) * (1 + change))


def _saturate(pixels: Pixels, change: float) -> Pixels:
    """Adds `change` times the distance from each pixel's grey."""
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, 1 + change, grey, -change, 0)


def _shift_hue(pixels: Pixels, change: float) -> Pixels:
    """Turns the colour wheel by `change` of a full turn."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(change * 256) % 256)  # hue has 256 steps and runs round
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_JITTERS = (_brighten, _contrast, _saturate, _shift_hue)


def _mapped(pixels: Pixels, values: np.ndarray) -> Pixels:
    return cv2.LUT(pixels, np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _rand_augment(pixels: Pixels, magnitude: int, draws: Sequence[float]) -> Pixels:
    operations = tuple(RAND_AUGMENT.values())
    for choice, sign in zip(draws[0::2], draws[1::2], strict=True):
        share = math.copysign(magnitude / _LARGEST_MAGNITUDE, sign - 0.5)
        pixels = operations[int(choice * len(operations))](pixels, share)
    return pixels


def _moved(pixels: Pixels, matrix: Sequence[Sequence[float]]) -> Pixels:
    """Carries every point (x, y) to matrix @ (x, y, 1)."""
    height, width = pixels.shape[:2]
    return cv2.warpAffine(
        pixels, np.asarray(matrix, np.float64), (width, height), borderMode=cv2.BORDER_CONSTANT, borderValue=_FILL
    )


def _translation(pixels: Pixels, share: float) -> int:
    return int(share * 150 / 331 * pixels.shape[0])


def _rotated(pixels: Pixels, degrees: float) -> Pixels:
    center = (pixels.shape[1] - 1) / 2, (pixels.shape[0] - 1) / 2
    return _moved(pixels, cv2.getRotationMatrix2D(center, degrees, 1.0))


def _by_pillow(pixels: Pixels, function: Callable[[Image.Image], Image.Image]) -> Pixels:
    return np.array(function(Image.fromarray(pixels)))


# Name -> operation on pixels, with the magnitude as a share of the largest, of either sign.
RAND_AUGMENT: dict[str, Callable[[Pixels, float], Pixels]] = {
    "identity": lambda pixels, share: pixels,
    "auto_contrast": lambda pixels, share: _by_pillow(pixels, ImageOps.autocontrast),
    "equalize": lambda pixels, share: _by_pillow(pixels, ImageOps.equalize),
    "posterize": lambda pixels, share: _by_pillow(
        pixels, lambda picture: ImageOps.posterize(picture, 8 - round(4 * abs(share)))
    ),
    "solarize": lambda pixels, share: _by_pillow(
        pixels, lambda picture: ImageOps.solarize(picture, 255 * (1 - abs(share)))
    ),
    "color": lambda pixels, share: _saturate(pixels, 0.9 * share),
    "contrast": lambda pixels, share: _contrast(pixels, 0.9 * share),
    "brightness": lambda pixels, share: _brighten(pixels, 0.9 * share),
    "sharpness": lambda pixels, share: _by_pillow(
        pixels, lambda picture: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * share)
    ),
    "shear_x": lambda pixels, share: _moved(pixels, ((1, 0.3 * share, 0), (0, 1, 0))),
    "shear_y": lambda pixels, share: _moved(pixels, ((1, 0, 0), (0.3 * share, 1, 0))),
    "translate_x": lambda pixels, share: _moved(pixels, ((1, 0, _translation(pixels, share)), (0, 1, 0))),
    "translate_y": lambda pixels, share: _moved(pixels, ((1, 0, 0), (0, 1, _translation(pixels, share)))),
    "rotate": lambda pixels, share: _rotated(pixels, 30 * share),
}
