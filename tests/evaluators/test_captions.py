"""Captions of a model that knows the pictures, or some of them."""

import numpy as np
import pytest
from PIL import Image

from mmjax import config as configs
from mmjax.data import image
from mmjax.errors import UserError
from mmjax.evaluators import Captions, caption_metrics, contact_sheet
from mmjax.evaluators.captions import bits_per_byte
from tests.data import samples

END = 1


class Words:
    """Of "picture 12 seen 0" the two numbers are tokens, the end follows; a token stands for two bytes."""

    def encode(self, texts, length):
        rows = [[2 + int(text.split()[1]), 2 + int(text.split()[3]), END, 0] for text in texts]
        return np.array(rows)[:, :length]

    def decode(self, ids):
        return "é" * int((ids > END).sum())


class Captioner:
    """Captions the samples, which it tells by their means, with a function from their number."""

    def __init__(self, caption, length=4):
        self.config = configs.default()
        self.config.model.encoders.image = configs.image_encoder(image_size=16)
        self.config.model.encoders.text = configs.text_encoder(length=length)
        self.means = [image.for_evaluation(image.decode(samples.png(n)), image.Fit(16)).mean() for n in range(30)]
        self.caption, self.options, self.tokenizer = caption, None, Words()

    def caption_rows(self, count, load_images, **options):
        self.options = options
        return [self.caption(number) for number in self.known(load_images(np.arange(count)))]

    def caption_likelihood_rows(self, images, texts, load_images, load_texts, batch_size):
        """A token of the image's own caption costs one bit, of another one two, and the end 7."""
        ids = load_texts(texts)
        own = ids[:, :1] - 2 == self.known(load_images(images))[:, None]
        return -np.log(2) * np.where(ids == END, 7, np.where(own, 1, 2)) * (ids != 0)

    def known(self, images):
        return np.abs(images.mean(axis=(1, 2, 3))[:, None] - np.array(self.means)).argmin(axis=1)


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
    assert metrics["exact_match"] == pytest.approx(expected)
    names = ("exact_match", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "bits_per_byte")
    assert tuple(metrics) == names
    assert metrics["bits_per_byte"] == pytest.approx((2 + 7) / 4)  # whatever it writes itself


def test_overlaps_are_those_of_the_captions_with_all_of_the_images_own(tmp_path):
    source = samples.write_all(tmp_path)["webdataset"]
    metrics, _ = evaluate(source, lambda n: samples.captions(n)[-1].upper() + "!")
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert metrics[name] == pytest.approx(1, abs=1e-6), name
    assert 5 < metrics["CIDEr-D"] < 10  # other captions of the same image differ
    made = [f"picture {n} seen" for n in range(samples.COUNT)]
    shorter, _ = evaluate(source, lambda n: made[n])
    references = [samples.captions(n) for n in range(samples.COUNT)]
    expected = [*caption_metrics.bleu(made, references), caption_metrics.rouge_l(made, references).mean()]
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
    assert [shorter[name] for name in names] == pytest.approx(expected)
    assert shorter["BLEU-1"] == pytest.approx(np.exp(1 - 4 / 3))  # all words hit, one is missing
    assert shorter["CIDEr-D"] == pytest.approx(caption_metrics.cider_d(made, references).mean())


def test_bits_per_byte_count_what_is_read_of_the_image_it_belongs_to():
    loaders = [lambda rows, shift=shift: np.stack([picture(n + shift) for n in rows]) for shift in (0, 1)]
    captions = [samples.captions(n) for n in range(9)]
    assert bits_per_byte(Captioner(str), captions, loaders[0], 4) == pytest.approx((2 + 7) / 4)
    assert bits_per_byte(Captioner(str), captions, loaders[1], 4) == pytest.approx((4 + 7) / 4)
    assert bits_per_byte(Captioner(str, length=1), captions, loaders[0], 4) == pytest.approx(1 / 2)
    mixed = [captions[0], captions[2], captions[1]]  # the first alone is right; the others have 1, 3 and 2 captions
    assert bits_per_byte(Captioner(str), mixed, loaders[0], 4) == pytest.approx((1 * 2 + 5 * 4 + 6 * 7) / (6 * 4))


def picture(number):
    return image.for_evaluation(image.decode(samples.png(number)), image.Fit(16))


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
    assert (metrics["unreadable_images"], metrics["exact_match"]) == (1, pytest.approx(2 / 3))
    with pytest.raises(UserError, match="no caption"):
        Captions(configs.captions(source=f"folder:{folder}", split="", captions=("french",))).open()
