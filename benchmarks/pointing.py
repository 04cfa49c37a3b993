"""Does relevance point at what the text names? Two emoji side by side, and the caption of one of them.

    python -m mmjax.main --config=configs/quickstart.py
    python benchmarks/pointing.py
    python benchmarks/pointing.py --picture=docs/explanations.png --json=pointing.json

Of `--cases` (200) pictures, each of two held-out emoji drawn with `--seed`, the share whose relevance
(`mmjax.explain`) lies for the most part on the half with the emoji that the caption names. Chance is 0.5.

    relevance             of the caption; the picture read in its own shape, twice as wide as high, so that an emoji
                          is as large as in training
    relevance_against     the same, of the caption rather than of the other emoji's
    relevance_squashed    the picture read as evaluation reads it: squashed into a square
    relevance_square      the two drawings on a square white canvas, read as evaluation reads it
    rollout               attention rollout, which does not know the caption
    occlusion_squashed    no explanation but the model's own answer, of the same pictures: which half, made white,
    occlusion_square      takes more of the similarity. What it cannot tell, no map of its attention will.

With --picture it draws the first cases: each picture beside its relevance.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmjax import runtime
from mmjax.errors import UserError

SHOWN = 6


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart", help="the run whose last checkpoint explains")
    parser.add_argument("--cases", type=int, default=200, help="pictures")
    parser.add_argument("--seed", type=int, default=0, help="of drawing pairs and sides")
    parser.add_argument("--split", default="test", help="of the emoji: test, train or all")
    parser.add_argument("--picture", type=Path, help="draw the first cases to this file")
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    import report  # beside this file, where a program finds it but a test does not

    runtime.configure()
    try:
        metrics = measure(arguments.workdir, arguments.cases, arguments.seed, arguments.split, arguments.picture)
    except UserError as error:
        parser.error(str(error))
    report.print_table(metrics, f"Relevance on the half that the caption names, {arguments.cases} pictures")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def measure(
    workdir: str, cases: int, seed: int = 0, split: str = "test", picture: Path | None = None
) -> dict[str, float]:
    """The share of cases that each kind of explanation gets right."""
    from mmjax import api, explain

    model = api.load(workdir)
    images, captions, others, right = make_cases(cases, seed, split)
    found = explain.relevance(model, images, captions, keep_shape=True)
    squares = [on_square(picture) for picture in images]
    maps = {
        "relevance": [each.image for each in found],
        "relevance_against": [
            each.image for each in explain.relevance(model, images, captions, others, keep_shape=True)
        ],
        "relevance_squashed": [each.image for each in explain.relevance(model, images, captions)],
        "relevance_square": [each.image for each in explain.relevance(model, squares, captions)],
        "rollout": explain.rollout(model, "image", images, keep_shape=True),
    }
    if picture is not None:
        draw(picture, captions, found)
    pointed = {name: [points_right(heat) for heat in heats] for name, heats in maps.items()}
    pointed["occlusion_squashed"] = needs_right_half(model, images, captions)
    pointed["occlusion_square"] = needs_right_half(model, squares, captions)
    return {f"pointing/{name}": float(np.mean(np.array(sides) == right)) for name, sides in pointed.items()}


def make_cases(cases: int, seed: int, split: str) -> tuple[list[np.ndarray], list[str], list[str], list[bool]]:
    """Pictures of two emoji with different names, a caption of each, that of the other one, and whether it is right."""
    from mmjax.data import image
    from mmjax.data.sources import open_source

    source, rng = open_source("openmoji:en", split), np.random.default_rng(seed)
    images, captions, others, sides = [], [], [], []
    while len(images) < cases:
        named, other = (source[int(index)] for index in rng.choice(len(source), 2, replace=False))
        (caption,), (other_caption,) = named["captions"]["en"], other["captions"]["en"]
        right = bool(rng.integers(2))
        if caption != other_caption:
            pair = [image.decode(record["image"]) for record in (named, other)]
            images.append(np.concatenate(pair[::-1] if right else pair, axis=1))
            captions.append(caption)
            others.append(other_caption)
            sides.append(right)
    return images, captions, others, sides


def on_square(picture: np.ndarray) -> np.ndarray:
    """A wide picture in the middle of a white square as wide."""
    height, width = picture.shape[:2]
    canvas = np.full((width, width, 3), 255, np.uint8)
    top = (width - height) // 2
    canvas[top : top + height] = picture
    return canvas


def needs_right_half(model, images: list[np.ndarray], captions: list[str]) -> list[bool]:
    """Whether the image without its right half is less similar to its caption than without its left one."""
    texts = model.encode_text(captions)

    def similarity(hide_right: bool) -> np.ndarray:
        shown = [picture.copy() for picture in images]
        for picture in shown:
            half = picture.shape[1] // 2
            picture[:, half if hide_right else 0 : None if hide_right else half] = 255
        return (model.encode_image(shown) * texts).sum(axis=1)

    return (similarity(True) < similarity(False)).tolist()


def points_right(heat: np.ndarray) -> bool:
    """Whether more than half of the map lies right of the middle; a column across it belongs half to each side."""
    columns = heat.sum(axis=0)
    half = len(columns) // 2
    left, right = columns[:half].sum(), columns[len(columns) - half :].sum()
    return bool(right > left)


def draw(path: Path, captions: list[str], found: list) -> None:
    """The first cases, two in a row: caption, picture and relevance."""
    from mmjax import explain

    tiles = []
    for caption, each in list(zip(captions, found, strict=True))[:SHOWN]:
        both = explain.beside_overlay(each)
        tile = Image.new("RGB", (both.shape[1] // 2 + 16, both.shape[0] // 2 + 34), "white")
        tile.paste(Image.fromarray(both).resize((both.shape[1] // 2, both.shape[0] // 2)), (8, 26))
        ImageDraw.Draw(tile).text((8, 5), caption, "black", ImageFont.load_default(14))
        tiles.append(np.asarray(tile))
    rows = [np.concatenate(tiles[start : start + 2], axis=1) for start in range(0, len(tiles) - 1, 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
