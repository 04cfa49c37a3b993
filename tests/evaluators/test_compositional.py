"""Captions against foils and images against each other, by models that know the samples, or nothing."""

import itertools
import json

import numpy as np
import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.evaluators.compositional import Compositional, winoground
from tests.data import samples
from tests.evaluators.test_retrieval import Oracle


class Scorer(Oracle):
    """Scores an image and a text by a table from their numbers; the cosine comes from the first ones in the table."""

    def __init__(self, table):
        super().__init__()
        self.table = np.asarray(table, np.float32)

    def encode_rows(self, modality, count, load_rows, batch_size):
        rows = load_rows(np.arange(count))
        return (
            np.eye(samples.COUNT, dtype=np.float32)[self.known(rows)]
            if modality == "image"
            else self.table.T[rows[:, 0]]
        )

    def match_rows(self, images, texts, load_images, load_texts, batch_size):
        return -self.table[self.known(load_images(images)), load_texts(texts)[:, 0]]


def write(folder, records, name="list.jsonl"):
    (folder / "images").mkdir(exist_ok=True)
    for number in range(6):
        (folder / "images" / f"{number}.png").write_bytes(samples.png(number))
    (folder / name).write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    return str(folder / name)


def evaluate(source, table, **options):
    evaluator = Compositional(configs.compositional(source=source, **options))
    evaluator.open()
    return dict(evaluator.evaluate(Scorer(table)))


def swapped(image, caption, foil, **fields):
    return {"image": f"images/{image}.png", "caption": f"picture {caption}", "foil": f"picture {foil}", **fields}


RECORDS = [
    swapped(0, 0, 1, category="add object"),
    swapped(1, 1, 2, category="add object"),
    swapped(2, 2, 0, category="swap/attribute"),
    swapped(3, 3, 1),
]


def test_accuracy_is_the_share_of_captions_above_their_foils(tmp_path):
    source, table = write(tmp_path, RECORDS), np.eye(samples.COUNT)
    names = ("accuracy", "accuracy_add_object", "accuracy_swap_attribute")
    assert evaluate(source, table) == dict.fromkeys(names, 1)
    table[1, 2] = 2
    assert evaluate(source, table) == dict(zip(names, (0.75, 0.5, 1), strict=True))
    table[3, 1] = 1  # a tie
    assert evaluate(source, table)["accuracy"] == 0.5
    for nothing in (np.ones_like(table), table * np.nan):
        assert evaluate(source, nothing) == dict.fromkeys(names, 0)
    assert evaluate(source, table, by="matching") == dict(zip(names, (0.25, 0.5, 0), strict=True))


def test_winogrounds_scores_are_those_of_its_definition():
    """All orders of the four scores of a record, ties among them, against section 3 of the paper."""
    scores = np.array(list(itertools.product(range(3), repeat=4)), float).reshape(-1, 2, 2)
    found = winoground(scores)
    for row, score in enumerate(scores):
        s = {(caption, image): score[image, caption] for caption in (0, 1) for image in (0, 1)}
        text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        assert tuple(values[row] for values in found) == (text, image, text and image)
    assert len({tuple(map(bool, row)) for row in zip(*found, strict=True)}) == 4  # they do differ


def test_two_images_and_two_captions(tmp_path):
    def record(first, second, **fields):
        return {
            **{f"image_{place}": f"images/{number}.png" for place, number in enumerate((first, second))},
            **{f"caption_{place}": f"picture {number}" for place, number in enumerate((first, second))},
            **fields,
        }

    source = write(tmp_path, [record(0, 1, tag="Object"), record(2, 3, tag="Relation"), swapped(4, 4, 5)])
    table = np.eye(samples.COUNT)
    table[0, 1] = 2  # image 0 prefers caption 1, and caption 1 image 0
    table[2, 3], table[2, 2] = 0.5, 0.75
    table[3, 2] = 0.8  # caption 2 prefers image 3; image 3 still has caption 3
    assert evaluate(source, table) == {
        "accuracy": 1,
        **{"text_score": 0.5, "text_score_Object": 0, "text_score_Relation": 1},
        **{"image_score": 0, "image_score_Object": 0, "image_score_Relation": 0},
        **{"group_score": 0, "group_score_Object": 0, "group_score_Relation": 0},
    }


@pytest.mark.parametrize(
    "names",
    [
        ("filename", "caption", "negative_caption"),  # SugarCrepe
        ("image_path", "true_caption", "false_caption"),  # ARO
        ("image_file", "caption", "foil"),  # VALSE
    ],
)
def test_the_files_of_the_benchmarks_are_read_as_they_are(tmp_path, names):
    records = [dict(zip(names, (f"{n}.png", f"picture {n}", f"picture {n + 1}"), strict=True)) for n in range(5)]
    table = np.eye(samples.COUNT)
    table[4, 5] = 1
    for content in (records, {f"key_{n}": record for n, record in enumerate(records)}):
        source = write(tmp_path, content, "list.json")
        assert evaluate(source, table, root=str(tmp_path / "images")) == {"accuracy": 0.8}


def test_images_that_cannot_be_read_are_counted(tmp_path):
    source = write(tmp_path, RECORDS)
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    metrics = evaluate(source, np.eye(samples.COUNT))
    assert metrics["unreadable_images"] == 1 and metrics["accuracy"] >= 0.75


@pytest.mark.parametrize(
    "record, message",
    [
        (swapped(7, 0, 1), "line 2: no image 'images/7.png' in "),
        (
            {"image": "images/0.png", "caption": "a"},
            "line 2: no foil or negative_caption or false_caption; it has: image",
        ),
        ({"caption": "a", "foil": "b"}, "line 2: no image or image_path or "),
        (
            {"image_0": "images/0.png", "image_1": "images/1.png", "caption_0": "a"},
            "line 2: no caption_1; it has: image_0",
        ),
        (swapped(0, 0, 1) | {"foil": " "}, "line 2: foil is no text but ' '"),
        (swapped(0, 0, 1) | {"caption": 3}, "line 2: caption is no text but '3'"),
        (swapped(0, 0, 1) | {"image": "../x.png"}, "line 2: '../x.png' leads out of .*; set `root`"),
        ([1], "line 2: no JSON object but list"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, record, message):
    source = write(tmp_path, [swapped(0, 0, 1), record])
    with pytest.raises(UserError, match=message) as caught:
        Compositional(configs.compositional(source=source)).open()
    assert "\n" not in str(caught.value)


def test_files_that_will_not_do(tmp_path):
    def opened(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            Compositional(configs.compositional(source=str(path))).open()
        return str(caught.value)

    assert opened("none.json") == f"cannot read {tmp_path}/none.json: No such file or directory"
    assert "a.jsonl, line 3: no JSON: " in opened("a.jsonl", b"\n \n{")
    assert "b.json: no JSON: " in opened("b.json", b"[")
    assert opened("c.json", b"3").endswith("c.json holds neither a list nor an object of records")
    assert opened("d.jsonl", b"\n").endswith("d.jsonl holds no record")
    assert "e.json, record 0: no image or " in opened("e.json", b"[{}]")
    assert "f.json is not in UTF-8" in opened("f.json", b"\xff[]")
    with pytest.raises(UserError, match="source is empty"):
        Compositional(configs.compositional()).open()
