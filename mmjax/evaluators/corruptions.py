"""Blur, noise, JPEG compression and loss of colour, each at five severities.

After "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (Hendrycks & Dietterich 2019),
section 3 and ImageNet-C, whose strengths for 224 pixels blur, noise and JPEG have. Greyscale is ours.
"""

import io

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

REFERENCE_SIZE = 224  # pixels: deviations of the blur are for this size
STRENGTHS = {
    "blur": (1.0, 2.0, 3.0, 4.0, 6.0),  # the Gaussian's standard deviation in pixels
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # its standard deviation, where white is 1
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "greyscale": (0.2, 0.4, 0.6, 0.8, 1.0),  # the share of grey
}
VERSIONS = ("clean", *(f"{kind}_{severity}" for kind in STRENGTHS for severity in range(1, 6)))
TRUNCATE = 4.0  # standard deviations, behind which the blur's Gaussian is cut off
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601

Pixels = UInt8[np.ndarray, "size size 3"]


def versions(pixels: Pixels, seed: int, index: int) -> UInt8[np.ndarray, "versions size size 3"]:
    """An image and its corruptions, in the order of VERSIONS.

    Noise comes from the seed and the image's number alone. It is drawn once, and grows with the severity.
    """
    noise = np.random.default_rng((seed, index)).standard_normal(pixels.shape, np.float32)
    scale = len(pixels) / REFERENCE_SIZE
    return np.stack(
        [
            pixels,
            *(blur(pixels, scale * strength) for strength in STRENGTHS["blur"]),
            *(_rounded(pixels + 255 * strength * noise) for strength in STRENGTHS["noise"]),
            *(jpeg(pixels, quality) for quality in STRENGTHS["jpeg"]),
            *(greyscale(pixels, share) for share in STRENGTHS["greyscale"]),
        ]
    )


def blur(pixels: Pixels, deviation: float) -> Pixels:
    """Convolves with a Gaussian; beyond the border, the image goes on as it ends there."""
    side = 2 * int(TRUNCATE * deviation + 0.5) + 1
    blurred = cv2.GaussianBlur(pixels.astype(np.float32), (side, side), deviation, borderType=cv2.BORDER_REPLICATE)
    return _rounded(blurred)


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    """Encodes as JPEG, colours at half the resolution, and decodes again."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    return np.asarray(Image.open(encoded).convert("RGB"))


def greyscale(pixels: Pixels, share: float) -> Pixels:
    """Mixes each pixel with the grey of its luma."""
    return _rounded(pixels + np.float32(share) * ((pixels @ LUMA)[..., None] - pixels))


def _rounded(pixels: Float[np.ndarray, "size size 3"]) -> Pixels:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
