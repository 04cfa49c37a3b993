import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmjax.data import image
from mmjax.errors import RecordError, UserError
from tests.data.make_goldens_image import CASES, GOLDENS, READ, picture

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
SMOOTH = np.asarray(Image.fromarray(picture(9, 13)).resize((130, 90), Image.Resampling.BICUBIC))
ORIENTATION = 0x0112


def encoded(pixels, form, **options):
    drawn = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    drawn.save(file, form, **({"lossless": True} if form == "WEBP" else {}) | options)
    return file.getvalue()


def png(width, height, bits=8, colors=2, rows=b"", extra=()):
    """A PNG made by hand, since Pillow refuses to write such."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colors, 0, 0, 0))
    middle = b"".join(chunk(*each) for each in extra) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IEND", b"")


def distance(one, other):
    return np.abs(one.astype(int) - other).mean()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(form):
    data = encoded(PHOTO, form)
    pixels = image.decode(data)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, PHOTO)
    assert image.header_size(data) == (40, 60)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}], ids=str)
def test_jpeg_is_decoded_as_by_pillow(options):
    data = encoded(SMOOTH, "JPEG", quality=90, **options)
    assert distance(image.decode(data), np.asarray(Image.open(io.BytesIO(data)))) < 0.1
    assert image.header_size(data) == (90, 130)


def test_quick_decoding_is_close_to_the_exact_one():
    data = encoded(SMOOTH, "JPEG", quality=90)
    assert 0 < distance(image.decode(data, quick=True), image.decode(data)) < 3


def test_avif():
    image.header_size(encoded(PHOTO, "PNG"))  # loads Pillow's plugins
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    assert distance(image.decode(encoded(SMOOTH, "AVIF", quality=95)), SMOOTH) < 5


def test_cmyk_jpeg_is_converted_as_by_pillow():
    data = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(image.decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert distance(image.decode(data), SMOOTH) < 5
    assert image.header_size(data) == (90, 130)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_grey(form):
    pixels = image.decode(encoded(SMOOTH[..., 0], form))
    assert (pixels == pixels[..., :1]).all() and distance(pixels[..., 0], SMOOTH[..., 0]) < 5


def test_one_bit():
    bits = PHOTO[..., 0] > 99
    np.testing.assert_array_equal(image.decode(encoded(bits, "PNG")), np.repeat(bits[..., None], 3, 2) * 255)


def test_palette():
    palette = Image.fromarray(PHOTO).quantize(16)
    np.testing.assert_array_equal(image.decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_transparency_is_laid_on_white():
    alpha = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    share = alpha[..., None] / 255
    expected = np.rint(PHOTO * share + 255 * (1 - share))
    for form in ("PNG", "WEBP", "TIFF"):
        pixels = image.decode(encoded(np.dstack([PHOTO, alpha]), form, **({"exact": True} if form == "WEBP" else {})))
        assert np.abs(pixels - expected).max() <= 1, form
    grey = image.decode(encoded(Image.fromarray(np.dstack([PHOTO[..., 0], alpha]), "LA"), "PNG"))
    assert np.abs(grey[..., 0] - expected[..., 0]).max() <= 1


def test_transparent_colours_of_palettes_and_plain_images_become_white():
    palette = Image.fromarray(PHOTO).quantize(4)
    colors, indices = np.asarray(palette.convert("RGB")), np.asarray(palette)
    one_index = image.decode(encoded(palette, "PNG", transparency=2))
    np.testing.assert_array_equal(one_index, np.where(indices[..., None] == 2, 255, colors))
    by_bytes = image.decode(encoded(palette, "PNG", transparency=b"\xff\x00\xff\xff"))
    np.testing.assert_array_equal(by_bytes, np.where(indices[..., None] == 1, 255, colors))
    red = np.array([[[200, 0, 0], [0, 9, 0]]], np.uint8)
    assert image.decode(encoded(red, "PNG", transparency=(200, 0, 0))).tolist() == [[[255] * 3, [0, 9, 0]]]


def test_sixteen_bits_keep_the_upper_eight():
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for form in ("PNG", "TIFF"):
        np.testing.assert_array_equal(image.decode(encoded(grey, form))[..., 0], grey >> 8)
    rgb = png(2, 1, bits=16, rows=b"\0" + struct.pack(">6H", 0, 256, 65535, 4660, 255, 32768))
    assert image.decode(rgb).tolist() == [[[0, 1, 255], [0x12, 0, 128]]]


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.5, 1.0], [0, 127, 255]), ([0, 40.0, 250], [0, 40, 250])])
def test_floating_point(values, expected):
    assert image.decode(encoded(np.array([values], np.float32), "TIFF"))[0, :, 0].tolist() == expected


def test_whole_numbers_of_32_bits():
    narrow, wide = np.array([[0, 32896, 65535]], np.int32), np.array([[-5, 2**30, 2**31 - 1]], np.int32)
    assert image.decode(encoded(narrow, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    assert image.decode(encoded(wide, "TIFF"))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (image.decode(data) == (255, 0, 0)).all() and image.header_size(data) == (10, 20)


def with_orientation(form, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(SMOOTH, form, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(form, orientation):
    data = with_orientation(form, orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    pixels = image.decode(data)
    assert pixels.shape == expected.shape and pixels.flags.c_contiguous
    assert distance(pixels, expected) < 0.1
    assert image.header_size(data) == expected.shape[:2]


def test_exif_behind_the_pixels_of_a_png_counts():
    data = with_orientation("PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert image.header_size(late) == (130, 90)
    np.testing.assert_array_equal(image.decode(late), np.rot90(SMOOTH, -1))


def test_invalid_exif_is_ignored():
    data = with_orientation("JPEG", 6)
    start, value = data.index(b"Exif\0\0"), data.index(struct.pack(">H", ORIENTATION)) + 8
    for position, replacement in ((start + 6, b"XX"), (start + 10, b"\xff\xff\xff\xff"), (value, b"\0\x63")):
        broken = data[:position] + replacement + data[position + len(replacement) :]
        assert image.decode(broken).shape == SMOOTH.shape and image.header_size(broken) == (90, 130)


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        ((90, 130), (90, 130)),
        ((46, 65), (90, 130)),
        ((45, 65), (45, 65)),
        ((23, 33), (23, 33)),
        ((12, 17), (12, 17)),
        ((1, 1), (12, 17)),
        ((500, 500), (90, 130)),
    ],
)
def test_a_jpeg_is_reduced_to_no_less_than_wanted(least, expected):
    data = encoded(SMOOTH, "JPEG", quality=95)
    pixels = image.decode(data, least)
    assert pixels.shape[:2] == expected
    factor = round(90 / expected[0])
    rows, columns = 90 // factor, 130 // factor  # those that stand for whole blocks
    blocks = image.decode(data)[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
    assert distance(pixels[:rows, :columns], blocks.mean((1, 3))) < 2
    assert image.decode(with_orientation("JPEG", 6), least[::-1]).shape[:2] == expected[::-1]
    assert image.decode(encoded(SMOOTH, "PNG"), least).shape == SMOOTH.shape


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encoded(PHOTO, "PNG")[:30], encoded(PHOTO, "JPEG")[:-50], encoded(PHOTO, "WEBP")[:-9]],
    ids=len,
)
def test_broken_bytes_are_an_error(data):
    with pytest.raises(RecordError, match=rf"^{len(data)} bytes cannot be decoded as an image: .+$"):
        image.decode(data)


def test_formats_that_nobody_asked_for_are_refused():
    postscript = encoded(PHOTO, "EPS")
    with pytest.raises(RecordError, match="none of JPEG, PNG"):
        image.decode(postscript)


GIF_BOMB = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;"
JPEG_BOMB = encoded(PHOTO, "JPEG").replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 60000, 60000))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", [png(100_000, 100_000), png(12_000, 12_000), GIF_BOMB, JPEG_BOMB, png(0, 5)], ids=len)
@pytest.mark.parametrize("read", [image.decode, image.header_size])
def test_images_of_impossible_size_are_refused_from_their_header(data, read):
    tracemalloc.start()
    with pytest.raises(RecordError, match="cannot be decoded"):
        read(data)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damage_gives_pixels_or_a_record_error(form):
    data = np.frombuffer(encoded(PHOTO, form), np.uint8)
    rng, refused = np.random.default_rng(1), 0
    for number in range(250):
        damaged = data.copy()
        reach = 100 if number % 2 else len(data)  # every other time in the header
        damaged[rng.integers(reach, size=rng.integers(1, 6))] = rng.integers(256)
        if number % 5 == 0:
            damaged = damaged[: rng.integers(len(data))]
        for least in (None, (9, 9)):
            try:
                pixels = image.decode(damaged.tobytes(), least)
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
                assert least or image.header_size(damaged.tobytes()) == pixels.shape[:2]
            except RecordError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "text.png"
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"text\.png: 12 bytes cannot be decoded"):
        image.load_file(str(path))
    with pytest.raises(UserError, match="cannot read the image"):
        image.load_file(str(tmp_path / "missing.png"))


def test_evaluation_resizes_like_pillow():
    for resample in image.RESAMPLES:
        expected = np.asarray(Image.fromarray(PHOTO).resize((24, 24), Image.Resampling[resample.upper()]))
        np.testing.assert_array_equal(image.for_evaluation(PHOTO, image.Fit(24, resample=resample)), expected)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize(("height", "width", "size"), CASES)
def test_evaluation_matches_the_stored_results_of_transformers(name, height, width, size):
    expected = np.load(GOLDENS)[f"{name}_{height}x{width}"]
    pixels = image.for_evaluation(picture(height, width), READ[name](size)[1])
    assert pixels.shape == expected.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1 and distance(pixels, expected) < 0.01


def test_the_centre_of_a_long_strip_costs_no_more_than_itself():
    strip = np.full((1, 200_000, 3), 9, np.uint8)
    np.testing.assert_array_equal(image.for_evaluation(strip, image.Fit(224, "center_crop")), np.full((224, 224, 3), 9))


def test_mirror():
    np.testing.assert_array_equal(image.mirror(PHOTO)[:, 0], PHOTO[:, -1])


def test_a_grey_picture_of_16_bits_is_the_same_as_its_file(tmp_path):
    picture = Image.fromarray(np.arange(0, 60_000, 1_000, np.uint16).reshape(6, 10))
    picture.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(image.pixels_of(picture), image.pixels_of(tmp_path / "grey.png"))
    assert np.ptp(image.pixels_of(picture)) > 200
