"""Zero-shot classification of pictures that a model knows, or takes for others, or tells nothing of."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from mmjax import config as configs
from mmjax.data import image
from mmjax.errors import UserError
from mmjax.evaluators import Evaluation, confusion_matrix, contact_sheet, zeroshot
from tests.data import samples
from tests.evaluators import make_goldens_zeroshot as goldens
from tests.test_api_text import model as tiny_model

CLASSES = ["apple", "bird", "cargo ship", "dog", "eel", "fox"]
COUNTS = [4, 1, 2, 3, 1, 1]
LABELS = np.repeat(np.arange(6), COUNTS)
PERFECT = {"zeroshot_top1": 1.0, "zeroshot_top5": 1.0, "mean_per_class_recall": 1.0, "expected_calibration_error": 0.0}


class Oracle:
    """Embeds picture n as the class that `taken_for[n]` numbers, and a sentence as the class that it names."""

    def __init__(self, taken_for=LABELS, names=CLASSES):
        self.config = configs.default()
        self.config.model.encoders.image = configs.image_encoder(image_size=16)
        self.config.model.encoders.text = configs.text_encoder(length=4)
        self.tokenizer, self.names, self.taken_for, self.sentences = self, names, taken_for, []
        self.means = np.array([self.mean(samples.png(number)) for number in range(len(LABELS))])

    @staticmethod
    def mean(data):
        return image.for_evaluation(image.decode(data), image.Fit(16)).mean()

    def logits(self):
        return {"logit_scale": 100.0, "logit_bias": 0.0}

    def encode(self, texts, length):
        self.sentences += texts
        return np.array([[next(n for n, name in enumerate(self.names) if name in text)] for text in texts])

    def encode_rows(self, modality, count, load_rows, batch_size):
        rows = load_rows(np.arange(count))
        if modality == "text":
            return np.eye(len(self.names), dtype=np.float32)[rows[:, 0]]
        known = np.abs(rows.mean(axis=(1, 2, 3))[:, None] - self.means).argmin(axis=1)
        return np.eye(len(self.names), dtype=np.float32)[np.asarray(self.taken_for)[known]]


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures with one for each class; the one of ships is written with an underscore."""
    for number, label in enumerate(LABELS):
        path = tmp_path / "pictures" / CLASSES[label].replace(" ", "_") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(samples.png(number))
    return tmp_path / "pictures"


def evaluate(source, model=None, picture=None, **options):
    evaluator = zeroshot.ZeroShot(configs.zeroshot(source=source, split="", **options))
    evaluator.open()
    return dict(evaluator.evaluate(model or Oracle(), picture))


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_folder_of_classes_needs_nothing_else(folder):
    model = Oracle()
    metrics = evaluate(f"folder:{folder}", model)
    assert metrics == pytest.approx(PERFECT)
    assert model.sentences == [template.format(name) for name in CLASSES for template in zeroshot.TEMPLATES]


def test_recall_is_a_mean_over_classes_and_accuracy_over_images(folder):
    apples_are_dogs = np.where(LABELS == 0, 3, LABELS)
    metrics = evaluate(f"folder:{folder}", Oracle(apples_are_dogs))
    assert metrics["zeroshot_top1"] == pytest.approx(8 / 12)
    assert metrics["mean_per_class_recall"] == pytest.approx(5 / 6)
    assert metrics["expected_calibration_error"] == pytest.approx(4 / 12)  # it is sure of all
    assert metrics["zeroshot_top5"] == pytest.approx(8 / 12)  # the other classes tie with theirs, which counts as last


def test_classes_are_numbered_by_a_file_or_named_by_captions(folder, tmp_path):
    upper = [name.upper() for name in CLASSES]
    model = Oracle(names=upper)
    classes = write(tmp_path / "classes.txt", *upper, "")
    assert evaluate(f"folder:{folder}", model, classes=classes)["zeroshot_top1"] == 1.0
    assert {sentence[-6:] for sentence in model.sentences} >= {" BIRD."}
    mixed = write(tmp_path / "mixed.txt", *upper[1:], upper[0])
    assert evaluate(f"folder:{folder}", Oracle(names=upper), classes=mixed)["zeroshot_top1"] == 0.0
    rows = [f"{CLASSES[n].replace(' ', '_')}/{i:02d}.png,{CLASSES[n]}" for i, n in enumerate(LABELS)]
    source = f"csv:{write(folder / 'list.csv', 'filepath,title', *rows)}"
    assert evaluate(source)["mean_per_class_recall"] == 1.0
    backwards = write(tmp_path / "backwards.txt", "yak", *CLASSES[::-1])
    model = Oracle(names=["yak", *CLASSES], taken_for=LABELS + 1)
    assert evaluate(source, model, classes=backwards) == pytest.approx(PERFECT)  # no recall of a class without image


def test_with_few_classes_there_is_no_top5(folder, tmp_path):
    for name in CLASSES[:3]:
        (tmp_path / "few").mkdir(exist_ok=True)
        (folder / name.replace(" ", "_")).rename(tmp_path / "few" / name)
    assert set(evaluate(f"folder:{tmp_path / 'few'}")) == set(PERFECT) - {"zeroshot_top5"}


def test_what_cannot_be_told_is_one_line(folder, tmp_path):
    source, five = f"folder:{folder}", write(tmp_path / "five.txt", *CLASSES[:5])
    listed = write(folder / "list.csv", "filepath,title", "eel/10.png,eel", "fox/11.png,wolf")
    (folder / "eel" / "10.txt").write_text("an eel\na fish")
    mistakes = [
        (source, {"classes": five}, "record 'fox/11.png' is of class 5, and .*five.txt has 5 lines"),
        (source, {"classes": str(tmp_path / "none.txt")}, "classes: cannot read .*none.txt"),
        (source, {"classes": write(tmp_path / "gap.txt", "a", "", "b")}, "classes: line 2 of .*gap.txt is empty"),
        (source, {"classes": write(tmp_path / "empty.txt")}, "classes: line 1 of .*empty.txt is empty"),
        (source, {"templates": write(tmp_path / "t.txt", "a {}", "b {d}")}, "templates: line 2 of .*t.txt has no {}"),
        (source, {}, "record 'eel/10.png' has 2 captions, and no one of them is its class: .'a fish', 'an eel'."),
        (source, {"captions": ("en",)}, "has no caption in en; .* set classes to a file"),
        (f"csv:{listed}", {"classes": five}, 'is of class "wolf", which is no line of .*five.txt'),
    ]
    for where, options, message in mistakes:
        with pytest.raises(UserError, match=message) as error:
            evaluate(where, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="^config.evaluators.pets: classes: cannot read"):
        Evaluation({"pets": configs.zeroshot(source=source, split="", classes="none.txt")})


def test_images_that_cannot_be_read_are_counted_and_every_record_is_a_sign_of_life(folder):
    (folder / "dog" / "07.png").write_bytes(b"no picture")
    beats = []
    evaluation = Evaluation({"pets": configs.zeroshot(source=f"folder:{folder}", split="")}, lambda: beats.append(1))
    assert len(beats) == 12
    metrics = dict(evaluation._made["pets"].evaluate(Oracle()))
    assert metrics["unreadable_images"] == 1 and metrics["zeroshot_top1"] >= 11 / 12


def test_the_picture_is_drawn_where_it_is_asked_for(folder, tmp_path):
    path = tmp_path / "new" / "matrix.png"
    evaluate(f"folder:{folder}", picture=path)
    assert not path.exists() and not path.with_name("reliability-matrix.png").exists()
    evaluate(f"folder:{folder}", picture=path, reliability_diagram=True)
    assert not path.exists() and path.with_name("reliability-matrix.png").exists()
    colours = []
    for taken_for in (LABELS, (LABELS + 1) % 6):
        evaluate(f"folder:{folder}", Oracle(taken_for), path, confusion_matrix=True)
        pixels = np.asarray(Image.open(path))
        colours.append([(pixels == colour).all(axis=2).any() for colour in (contact_sheet.RIGHT, contact_sheet.WRONG)])
    assert colours == [[True, False], [False, True]]


def test_recalls_are_written_beside_the_picture(folder, tmp_path):
    (folder / "eel").rename(folder / 'Öl, "eel"')
    path = tmp_path / "new" / "pets-00000007.png"
    names = ["apple", "bird", "cargo ship", "dog", "fox", 'Öl, "eel"']
    apples_are_dogs = np.where(LABELS == 0, 3, LABELS)
    evaluate(
        f"folder:{folder}", Oracle(np.where(LABELS == 4, 5, np.where(LABELS == 5, 4, apples_are_dogs)), names), path
    )
    with open(path.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    expected = [("apple", 4, 0.0), ("bird", 1, 1.0), ("cargo ship", 2, 1.0), ("dog", 3, 1.0), ("fox", 1, 1.0)]
    found = [(row["class"], int(row["images"]), float(row["recall"])) for row in rows]
    assert found == [*expected, ('Öl, "eel"', 1, 1.0)]


def test_captions_that_are_named_come_before_labels(tmp_path):
    """Where a data set's labels number other classes than those of the file."""
    (tmp_path / "a.png").write_bytes(samples.png(0)), (tmp_path / "b.png").write_bytes(samples.png(4))
    source = f"csv:{write(tmp_path / 'list.csv', 'filepath,title,label', 'a.png,apple,1', 'b.png,bird,0')}"
    classes = write(tmp_path / "classes.txt", *CLASSES)
    assert evaluate(source, classes=classes)["zeroshot_top1"] == 0.0
    assert evaluate(source, classes=classes, captions=("title",))["zeroshot_top1"] == 1.0


class Sentences:
    """A tokenizer and a text tower: a sentence's embedding comes from its letters."""

    def __init__(self):
        self.config = configs.default()
        self.config.model.encoders.text = configs.text_encoder(length=4)
        self.tokenizer, self.most = self, 0

    def encode(self, texts, length):
        self.most = max(self.most, len(texts))
        return np.array([[sum(map(ord, text)), len(text)] for text in texts])

    def encode_rows(self, modality, count, load_rows, batch_size):
        rows = [np.random.default_rng(row).normal(size=8) for row in load_rows(np.arange(count))]
        return goldens.unit(np.array(rows))


def test_prompts_are_averaged_as_unit_vectors_and_made_unit_vectors_again(monkeypatch):
    templates, model = ["a {}, drawn", "{c}", "{}, or {c}!"], Sentences()
    expected = []
    for name in CLASSES:
        sentences = [f"a {name}, drawn", name, f"{name}, or {name}!"]
        mean = model.encode_rows("text", 3, model.encode(sentences, 4).__getitem__, 1).mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(zeroshot.class_embeddings(model, CLASSES, templates, 4), expected, atol=1e-6)
    model.most = 0
    monkeypatch.setattr(zeroshot, "PROMPTS", 7)
    np.testing.assert_allclose(zeroshot.class_embeddings(model, CLASSES, templates, 4), expected, atol=1e-6)
    assert model.most == 6  # sentences at a time
    assert zeroshot.fill("{} {c} {d}", "{}") == "{} {} {d}"


@pytest.mark.parametrize("name", goldens.CLASSIFICATIONS)
def test_the_metrics_are_scikit_learns(name):
    images, classes, labels = goldens.classification(*goldens.CLASSIFICATIONS[name])
    found = zeroshot.class_ranks(images, classes, labels, [f"class {number}" for number in range(len(classes))])
    metrics = {"zeroshot_top1": (found < 1).mean(), "zeroshot_top5": (found < 5).mean()}
    metrics["mean_per_class_recall"] = zeroshot.mean_per_class_recall(labels, found == 0)
    assert metrics == pytest.approx(json.loads(goldens.PATH.read_text())[name], abs=1e-6)
    predicted = zeroshot.predictions(images, classes, labels, found)
    np.testing.assert_array_equal(predicted, (images.astype(float) @ classes.T.astype(float)).argmax(axis=1))


def test_a_model_that_tells_nothing_apart_is_never_right():
    vector = np.random.default_rng(0).normal(size=(1, 100))
    for same in (goldens.unit(np.repeat(vector, 40, axis=0)), np.full((40, 100), np.nan, np.float32)):
        labels = np.arange(40) % 30
        found = zeroshot.class_ranks(same, same[:30], labels, [str(number) for number in range(30)])
        assert (found == 29).all()
        assert (zeroshot.predictions(same, same[:30], labels, found) != labels).all()


def test_classes_of_one_name_come_in_their_order():
    """As the largest of equal scores is the first, in every library: lists such as ImageNet's have such names."""
    names, eye = ["crane", "dog", "crane", "crane"], np.eye(2, dtype=np.float32)
    classes, labels = eye[[0, 1, 0, 0]], np.array([0, 1, 2, 3])
    assert zeroshot.class_ranks(classes, classes, labels, names).tolist() == [0, 0, 1, 2]
    found = zeroshot.class_ranks(classes, classes, labels, list("abcd"))
    assert found.tolist() == [2, 0, 2, 2]


def test_the_most_confused_classes_are_chosen_by_their_errors():
    labels = np.repeat([7, 30, 8, 50], [9, 5, 3, 20])
    predicted = np.repeat([30, 30, 7, 11, 50], [9, 5, 3, 1, 19])
    assert confusion_matrix.most_confused(labels, predicted, 60).tolist() == [7, 30, 8, 50, 11]
    assert confusion_matrix.most_confused(labels, predicted, 20).tolist() == list(range(20))
    labels = np.arange(3000)
    assert len(confusion_matrix.most_confused(labels, labels[::-1], 3000)) == confusion_matrix.MOST


def test_the_same_numbers_on_one_device_and_on_eight(openmoji_folder, folder):
    models = [tiny_model(devices, everything=False) for devices in (1, 8)]
    one, eight = (zeroshot.class_embeddings(model, CLASSES, zeroshot.TEMPLATES, 8) for model in models)
    np.testing.assert_allclose(one, eight, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    found = [evaluate(f"folder:{folder}", model, batch_size=8) for model in models]
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0]["zeroshot_top5"] > 0
