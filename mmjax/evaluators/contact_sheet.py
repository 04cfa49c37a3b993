"""Pictures of rows of images (such as what captions retrieve, the right ones framed), and of captions for images."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmjax.data import image

TILE, GAP, CAPTION_HEIGHT, FRAME = 112, 12, 30, 4
RIGHT, WRONG, INK, PAPER = (22, 140, 60), (176, 38, 38), (32, 32, 32), (255, 255, 255)


def draw(
    path: Path,
    captions: Sequence[str],
    images: Sequence[Sequence[image.Pixels]],
    right: Sequence[Sequence[bool]] | None = None,
) -> None:
    """Draws the sheet as PNG.

    Args:
      path: where; the folder is made.
      captions: one for each row.
      images: for each row the images, TILE pixels a side, best first.
      right: for each row, which of them the caption belongs to, where that is the question.
    """
    columns = max(len(row) for row in images)
    width = columns * (TILE + GAP) + GAP
    row_height = CAPTION_HEIGHT + TILE + GAP
    sheet = Image.new("RGB", (width, len(captions) * row_height + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for row, caption in enumerate(captions):
        top = GAP + row * row_height
        hit = "" if right is None or any(right[row]) else f"   (not among the first {columns})"
        fitting = shortened(caption, font, width - 2 * GAP - font.getlength(hit))
        pen.text((GAP, top), fitting + hit, INK, font)
        for column, pixels in enumerate(images[row]):
            left, tile_top = GAP + column * (TILE + GAP), top + CAPTION_HEIGHT - 6
            sheet.paste(Image.fromarray(pixels), (left, tile_top))
            if right is not None and right[row][column]:
                box = (left - FRAME, tile_top - FRAME, left + TILE + FRAME - 1, tile_top + TILE + FRAME - 1)
                pen.rectangle(box, outline=RIGHT, width=FRAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def shortened(caption: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The caption, shortened with "..." to `width` pixels."""
    if font.getlength(caption) <= width:
        return caption
    while caption and font.getlength(caption + "...") > width:
        caption = caption[:-1]
    return caption + "..."


def draw_captions(path: Path, images: Sequence[image.Pixels], captions: Sequence[tuple[str, bool, str]]) -> None:
    """Draws images, each with the caption that was made for it and, where that is wrong, its own.

    Args:
      path: where; the folder is made.
      images: TILE pixels a side.
      captions: for each image: what was made, whether it is right, and what is right.
    """
    columns, width = 2, 430
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * (TILE + GAP) + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, (pixels, (made, right, wanted)) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + number % columns * width, GAP + number // columns * (TILE + GAP)
        sheet.paste(Image.fromarray(pixels), (left, top))
        room, text_left = width - TILE - 3 * GAP, left + TILE + GAP
        pen.text((text_left, top + 34), shortened(made, font, room), RIGHT if right else WRONG, font)
        if not right:
            pen.text((text_left, top + 58), shortened(f"({wanted})", font, room), INK, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
