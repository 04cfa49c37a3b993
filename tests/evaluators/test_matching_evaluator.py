"""Own and wrong captions, told apart by models that know the samples, or nothing."""

import numpy as np
import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.evaluators.matching import HARD, Matching, area_under_roc, wrong_texts
from tests.data import samples
from tests.evaluators.goldens import GOLDENS
from tests.evaluators.test_retrieval import Oracle


@pytest.mark.parametrize("curve", GOLDENS["curves"])
def test_the_area_under_the_curve_is_that_of_scikit_learn(curve):
    found = area_under_roc(np.array(curve["scores"]), np.array(curve["belongs"]))
    assert found == pytest.approx(curve["auc"], abs=1e-12)


def test_ties_count_half_and_nans_against_the_model():
    belongs = np.array([True, True, False, False])
    assert area_under_roc(np.zeros(4), belongs) == 0.5
    assert area_under_roc(np.array([1, 0, 0, -1.0]), belongs) == (1 + 1 + 0.5 + 1) / 4
    assert area_under_roc(np.full(4, np.nan), belongs) == 0
    assert area_under_roc(np.array([1, np.nan, 0, 0]), belongs) == area_under_roc(np.array([1, 1, np.nan, 0]), belongs)


class Judge(Oracle):
    """What it says of pairs is a function of whether they belong together."""

    def __init__(self, says):
        super().__init__()
        self.says = says

    def encode(self, texts, length):
        self.texts = texts
        return super().encode(texts, length)

    def agreed(self, array):
        return array

    def match_rows(self, images, texts, load_images, load_texts, batch_size):
        self.asked = images, [self.texts[text] for text in texts]
        self.belong = self.known(load_images(images)) == load_texts(texts)[:, 0]
        return self.says(self.belong).astype(np.float32)


def evaluate(source, says=lambda belong: np.where(belong, 1, -1), **options):
    judge, evaluator = Judge(says), Matching(configs.matching(source=source, split="", **options))
    evaluator.open()
    return dict(evaluator.evaluate(judge)), judge


def test_each_own_caption_is_asked_with_a_wrong_one(tmp_path):
    source = samples.write_all(tmp_path)["webdataset"]
    metrics, judge = evaluate(source)
    assert metrics == {"matching_accuracy": 1, "matching_auc": 1}
    own = [caption for number in range(samples.COUNT) for caption in samples.captions(number)]
    images, texts = judge.asked
    assert texts[: len(own)] == own and len(texts) == 2 * len(own)
    np.testing.assert_array_equal(judge.belong, np.arange(2 * len(own)) < len(own))
    assert len(set(texts[len(own) :])) > samples.COUNT / 2
    np.testing.assert_array_equal(images[: len(own)], images[len(own) :])
    assert evaluate(source)[1].asked[1] == texts != evaluate(source, seed=1)[1].asked[1]


@pytest.mark.parametrize(
    "says, accuracy, auc",
    [
        (lambda belong: belong * 0.0, 0.5, 0.5),  # nothing is likelier than not
        (lambda belong: belong + 1.0, 0.5, 1.0),  # in order, but everything belongs
        (lambda belong: -np.where(belong, 1.0, -1.0), 0, 0),
        (lambda belong: belong * np.nan, 0, 0),
    ],
)
def test_accuracy_asks_for_the_probability_and_the_curve_for_the_order(tmp_path, says, accuracy, auc):
    metrics, _ = evaluate(samples.write_all(tmp_path)["webdataset"], says)
    assert metrics == {"matching_accuracy": accuracy, "matching_auc": auc}


def test_equal_texts_and_captions_of_the_same_image_are_not_wrong(tmp_path):
    """A row for each caption, and captions that come back in other spellings."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(samples.png(number))
    rows = [
        "0.png,picture 0 seen",
        "0.png,picture 0 twice",
        "1.png,Picture 0  SEEN",
        "2.png,picture 2",
        "1.png,picture 1",
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["filepath,title", *rows]))
    for seed in range(4):
        _, judge = evaluate(f"csv:{tmp_path}/rows.csv", seed=seed)
        images, texts = (list(column) for column in judge.asked)
        assert images == [0, 0, 1, 2, 1] * 2
        assert texts[:5] == ["picture 0 seen", "picture 0 twice", "picture 0 seen", "picture 2", "picture 1"]
        own = {0: texts[:2], 1: [texts[0], texts[4]], 2: [texts[3]]}
        assert not [text for image, text in zip(images[5:], texts[5:], strict=True) if text in own[image]]
    (tmp_path / "rows.csv").write_text("filepath,title\n0.png,the same\n1.png,THE same")
    with pytest.raises(UserError, match="no wrong caption for the image of record .*: it has all 1"):
        Matching(configs.matching(source=f"csv:{tmp_path}/rows.csv", split="")).open()


def test_hard_ones_are_among_the_ten_most_similar_that_are_not_the_images_own(tmp_path):
    nearest = np.array([[4, 0, 1, 2, 3, *range(5, 30)], [*range(29, -1, -1)]])
    images, own = np.repeat([0, 1], 300), [{0, 4, 7}, {28}]
    texts = np.where(images == 0, 0, 28)
    drawn = wrong_texts(images, texts, own, 0, nearest)
    assert set(drawn[:300]) == {1, 2, 3, 5, 6, 8, 9, 10, 11, 12} and len(set(drawn[300:])) == HARD
    assert set(drawn[300:]) == {29, *range(27, 18, -1)}
    np.testing.assert_array_equal(drawn, wrong_texts(images, texts, own, 0, nearest))
    source = samples.write_all(tmp_path)["webdataset"]
    _, judge = evaluate(source, hard=True)
    # The oracle finds all other texts equally similar: the first ten that are not the image's own come first.
    wrong = judge.asked[1][len(judge.asked[1]) // 2 :]
    assert {int(text.split()[1]) for text in wrong} <= set(range(HARD)) and not judge.belong[len(wrong) :].any()


def test_images_that_cannot_be_read_are_counted(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(samples.png(number))
        (tmp_path / f"{number}.txt").write_text(samples.captions(number)[0])
    (tmp_path / "1.png").write_bytes(b"no picture")
    metrics, _ = evaluate(f"folder:{tmp_path}")
    assert metrics["unreadable_images"] == 1
