"""Image bytes to pixels, and pixels to the fixed size at which models are evaluated.

JPEG goes through libjpeg-turbo, which can also decode at a half, a quarter or an eighth of the size for less work;
every other format, and every JPEG that libjpeg-turbo finds fault with, goes through Pillow.
"""

import functools
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from mmjax.errors import RecordError, UserError, one_line

cv2.setNumThreads(0)  # the pipeline has its own threads and workers

Pixels = UInt8[np.ndarray, "height width 3"]

MAX_PIXELS = 2**27  # of one image: 400 MB as RGB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow would warn of less; what it lets through is refused here

_TOO_LARGE = f"it has more than {MAX_PIXELS:,} pixels"
_WANTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_JPEG_START = b"\xff\xd8\xff"
_APP1, _START_OF_SCAN = 0xE1, 0xDA  # kinds of segments in a JPEG
_EXIF_START = b"Exif\0\0"
_EXIF_REACH = 2**16  # bytes of a JPEG before which it has to begin; cameras write it first of all
_ORIENTATION = 0x0112
# How stored pixels are laid out for display, by EXIF's orientation (TIFF 6.0, section 8).
_TURNS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_FIRST_SIDEWAYS = 5  # from this orientation on, height and width are exchanged


def decode(data: bytes, least: tuple[int, int] | None = None, quick: bool = False) -> Pixels:
    """Decodes an encoded image as RGB, upright; transparency is laid on white.

    Of an animation it is the first frame; 16 bits a channel become 8.

    Args:
      data: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF.
      least: height and width that are enough. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, the smallest
        that has at least these.
      quick: decodes a JPEG 5 to 15 % faster and a little less exactly: for training.

    Raises:
      RecordError: the bytes are no such image, are damaged, or have more than MAX_PIXELS pixels.
    """
    try:
        pixels = _decode_jpeg(data, least, quick) if data.startswith(_JPEG_START) else None
        return _decode_with_pillow(data) if pixels is None else pixels
    except Exception as error:  # of the kinds that decoders raise on hostile bytes there is no list
        raise _undecodable(data, error) from error


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded image as `decode` returns it, from its header alone.

    Raises:
      RecordError: as `decode`; what is damaged behind the header goes unnoticed.
    """
    try:
        if data.startswith(_JPEG_START):
            header = _jpeg_header(data)
            if header:
                return _displayed(header[0], header[1], _jpeg_orientation(data))
        picture = _open(data)
        return _displayed(picture.height, picture.width, _orientation(picture, data))
    except Exception as error:
        raise _undecodable(data, error) from error


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


def is_one(images: Any) -> bool:
    """Whether this is one image, as `pixels_of` takes it, and not several."""
    return isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3)


def pixels_of(image: Any) -> Pixels:
    """The pixels of a file, a PIL image (transparency is white) or an array.

    Raises:
      UserError: the file is missing or is no image, or the array has another shape or type.
    """
    if isinstance(image, str | Path):
        return load_file(str(image))
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            return _to_8_bits(image)
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"an image array is uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels


class Fit(NamedTuple):
    """How evaluation fits an image into the square of `size` pixels that a tower reads.

    `resize` (a name in FOR_EVALUATION) says to what the image is resized, `resample` (in RESAMPLES) with which of
    Pillow's antialiased filters. The square is its middle: `crop_fraction` of each of its sides, or of the shorter one.
    """

    size: int
    resize: str = "squash"
    resample: str = "bicubic"
    crop_fraction: float = 1.0


def fit_of(encoder: Mapping[str, Any]) -> Fit:
    """What an image encoder's settings (`mmjax.config.image_encoder`) say of it."""
    return Fit(encoder["image_size"], encoder["resize"], encoder["resample"], encoder["crop_fraction"])


def _squashed(height: int, width: int, size: int) -> tuple[int, int]:
    return size, size


def _kept(height: int, width: int, size: int) -> tuple[int, int]:
    shorter = min(height, width)
    return size * height // shorter, size * width // shorter


# The height and width to which an image is resized before its middle is cut out. "squash", as SigLIP and ViT are
# evaluated, makes it a square; "center_crop", as CLIP is, gives the shorter side that length, and rounds the longer one
# down, as `transformers.CLIPImageProcessor` does. Half of an odd margin is rounded down too; "center_crop_rounded"
# rounds it to an even number, as torchvision and so open_clip do.
FOR_EVALUATION = {"squash": _squashed, "center_crop": _kept, "center_crop_rounded": _kept}
RESAMPLES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def for_evaluation(pixels: Pixels, fit: Fit) -> UInt8[np.ndarray, "size size 3"]:
    """Brings an image to the size of evaluation.

    Of a long strip only what is cut out is computed, so it costs no more; one value in a hundred is rounded the other
    way for it.
    """
    height, width = pixels.shape[:2]
    before_cutting = int(fit.size / fit.crop_fraction + 1e-6)  # 224 / (224 / 249) can come out below 249
    resized = FOR_EVALUATION[fit.resize](height, width, before_cutting)
    if (height, width) == resized == (fit.size, fit.size):
        return pixels
    picture, resample = Image.fromarray(pixels), RESAMPLES[fit.resample]
    half = round if fit.resize == "center_crop_rounded" else int
    top, left = (half((side - fit.size) / 2) for side in resized)
    if resized[0] * resized[1] <= 4 * fit.size**2:
        whole = np.asarray(picture.resize((resized[1], resized[0]), resample))
        return whole[top : top + fit.size, left : left + fit.size]
    down, right = height / resized[0], width / resized[1]
    box = left * right, top * down, min((left + fit.size) * right, width), min((top + fit.size) * down, height)
    return np.asarray(picture.resize((fit.size, fit.size), resample, box=box))


def mirror(pixels: Pixels) -> Pixels:
    """The image with left and right exchanged."""
    return cv2.flip(pixels, 1)


def _undecodable(data: bytes, error: Exception) -> RecordError:
    if isinstance(error, Image.UnidentifiedImageError):  # its text holds an address in memory
        reason = f"it is none of {', '.join(_formats())}"
    elif isinstance(error, Image.DecompressionBombError):
        reason = _TOO_LARGE
    else:
        reason = one_line(error)
    return RecordError(f"{len(data)} bytes cannot be decoded as an image: {reason}")


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(_TOO_LARGE)
    if height * width < 1:
        raise ValueError("it has no pixels")


def _decode_jpeg(data: bytes, least: tuple[int, int] | None, quick: bool) -> Pixels | None:
    """The pixels, or None where Pillow has to judge."""
    header = _jpeg_header(data)
    if header is None:
        return None
    height, width, colorspace, _ = header
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    orientation = _jpeg_orientation(data)
    reduced = _reduced(height, width, _displayed(*least, orientation)) if least else (0, 0)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, fastdct=quick, fastupsample=quick, min_height=reduced[0], min_width=reduced[1]
        )
    except ValueError as error:
        if "premature end" in str(error).lower():  # Pillow lets one pass that was cut short and ended anew
            raise
        return None
    return _turn(pixels, orientation)


def _jpeg_header(data: bytes) -> tuple[int, int, str, str] | None:
    """Stored height and width, colour space and subsampling; None where libjpeg-turbo finds a fault."""
    try:
        header = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(header[0], header[1])
    return header


def _reduced(height: int, width: int, least: tuple[int, int]) -> tuple[int, int]:
    """The smallest size that has the least one, at the three reductions that libjpeg-turbo has fast code for."""
    for factor in (8, 4, 2):
        reduced = -(-height // factor), -(-width // factor)
        if reduced[0] >= least[0] and reduced[1] >= least[1]:
            return reduced
    return height, width


def _jpeg_orientation(data: bytes) -> int:
    """Goes from segment to segment (ISO/IEC 10918-1, annex B) up to the one with EXIF."""
    position = 2
    while position < _EXIF_REACH and position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, position + 1)
        start, position = position + 4, position + 2 + length
        if marker == _APP1 and data.startswith(_EXIF_START, start):
            return _exif_orientation(data[start:position])
        if marker == _START_OF_SCAN:
            break
    return 1


def _exif_orientation(exif: bytes) -> int:
    """Orientation, 1 to 8, in the first directory of an EXIF block; 1 where it is missing or makes no sense."""
    exif = exif.removeprefix(_EXIF_START)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == _ORIENTATION:
                return value if value in _TURNS else 1
    except struct.error:  # it points behind its end
        pass
    return 1


def _displayed(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation >= _FIRST_SIDEWAYS else (height, width)


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data), formats=_formats())
    _check_size(picture.height, picture.width)
    return picture


def _orientation(picture: Image.Image, data: bytes) -> int:
    if data.startswith(_JPEG_START):
        return _jpeg_orientation(data)
    if picture.format == "PNG" and b"eXIf" in data:
        picture.load()  # it may stand behind the pixels
    exif = picture.info.get("exif")  # not for TIFF, which Pillow turns itself
    return _exif_orientation(exif) if isinstance(exif, bytes) else 1


def _decode_with_pillow(data: bytes) -> Pixels:
    picture = _open(data)
    orientation = _orientation(picture, data)
    if picture.mode in ("I", "F"):  # these take several times the memory
        _check_size(8 * picture.height, picture.width)
    picture.load()
    if picture.mode.startswith(("I", "F")):
        return _turn(_to_8_bits(picture), orientation)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGB", picture.size, "white")
        canvas.paste(picture, mask=picture.getchannel("A"))
        picture = canvas
    return _turn(np.array(picture.convert("RGB")), orientation)


def _to_8_bits(picture: Image.Image) -> Pixels:
    """Grey of 16 or 32 bits or floating point: white is the least of the usual whites that no pixel exceeds."""
    grey = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        grey = (grey >> 8).astype(np.uint8)
    else:
        grey = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
        whites = (65535, 2**31 - 1) if picture.mode == "I" else (1, 255, 65535)
        brightest = grey.max()
        white = next((white for white in whites if brightest <= white), brightest)
        grey = np.clip(grey / white * 255, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
