"""Captions of a model that knows the pictures, or some of them."""

import numpy as np
import pytest
from PIL import Image

from mmjax import config as configs
from mmjax.data import image
from mmjax.errors import UserError
from mmjax.evaluators import Captions, contact_sheet
from tests.data import samples


class Captioner:
    """Captions the samples, which it tells by their means, with a function from their number."""

    def __init__(self, caption):
        self.config = configs.default()
        self.config.model.encoders.image = configs.image_encoder(image_size=16)
        self.means = [image.for_evaluation(image.decode(samples.png(n)), 16, "squash").mean() for n in range(30)]
        self.caption, self.options = caption, None

    def caption_rows(self, count, load_images, **options):
        self.options = options
        images = load_images(np.arange(count))
        known = np.abs(images.mean(axis=(1, 2, 3))[:, None] - np.array(self.means)).argmin(axis=1)
        return [self.caption(number) for number in known]


def evaluate(source, caption, picture=None, **options):
    model, evaluator = Captioner(caption), Captions(configs.captions(source=source, split="", **options))
    evaluator.open()
    return dict(evaluator.evaluate(model, picture)), model.options


@pytest.mark.parametrize(
    "caption, expected",
    [
        (lambda n: samples.captions(n)[-1], 1.0),  # any of an image's own is right
        (lambda n: f"  Picture {n}   SEEN 0 ", 1.0),
        (lambda n: samples.captions(n)[0] if n < 6 else "picture", 6 / 30),
        (lambda n: samples.captions(n)[0] + " twice", 0.0),
        (lambda n: samples.captions(29 - n)[0], 0.0),
    ],
)
def test_exact_matches_are_counted_up_to_case_and_spaces(tmp_path, caption, expected):
    metrics, _ = evaluate(samples.write_all(tmp_path)["webdataset"], caption)
    assert metrics == {"exact_match": pytest.approx(expected)}


def test_its_options_reach_the_search(tmp_path):
    options = {"batch_size": 8, "beams": 3, "length_penalty": 0.5}
    source = samples.write_all(tmp_path)["webdataset"]
    assert evaluate(source, str, **options)[1] == options
    assert evaluate(source, str)[1]["beams"] == 1


def test_the_contact_sheet_has_what_was_made_in_green_where_it_is_right(tmp_path):
    source, colours = samples.write_all(tmp_path)["webdataset"], {}
    for name, caption in (("right", lambda n: samples.captions(n)[0]), ("wrong", lambda n: "something else")):
        path = tmp_path / "pictures" / f"{name}.png"
        evaluate(source, caption, path, contact_sheet=True)
        pixels = np.asarray(Image.open(path))
        colours[name] = [(pixels == colour).all(axis=2).any() for colour in (contact_sheet.RIGHT, contact_sheet.WRONG)]
    assert colours == {"right": [True, False], "wrong": [False, True]}
    evaluate(source, str, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_images_that_cannot_be_read_are_counted_and_records_without_captions_refused(tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(samples.png(number))
        (folder / f"{number}.txt").write_text(samples.captions(number)[0])
    (folder / "1.png").write_bytes(b"no picture")
    metrics, _ = evaluate(f"folder:{folder}", lambda n: samples.captions(n)[0])
    assert metrics == {"unreadable_images": 1, "exact_match": pytest.approx(2 / 3)}
    with pytest.raises(UserError, match="no caption"):
        Captions(configs.captions(source=f"folder:{folder}", split="", captions=("french",))).open()
