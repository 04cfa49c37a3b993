import json
from collections import Counter

import pytest

from mmjax import config as configs
from mmjax.data import emoji_classes, openmoji
from mmjax.data.sources import open_source
from mmjax.errors import UserError
from mmjax.evaluators import EVALUATORS

TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


def base(key):
    return "-".join(point for point in key.split("-") if point not in TONES)


def records(split):
    source = open_source("openmoji", split)
    return [source[index] for index in range(len(source))]


def test_counts_and_captions(openmoji_folder):
    train, test, everything = records("train"), records("test"), records("all")
    assert (len(train), len(test), len(everything)) == (3544, 400, 3944)
    assert len({record["key"] for record in everything}) == 3944
    for record in everything:
        assert set(record["captions"]) == set(openmoji.LANGUAGES)
        assert all(names and all(names) for names in record["captions"].values())
    assert json.loads((openmoji_folder / "manifest.json").read_text())["licence"] == "CC-BY-SA-4.0"


def test_every_part_of_a_test_emoji_is_seen_in_training_but_not_the_whole():
    train, test = records("train"), records("test")
    train_bases = Counter(base(record["key"]) for record in train if set(record["key"].split("-")) & TONES)
    train_tones = {point for record in train for point in record["key"].split("-")} & TONES
    train_names = {record["captions"]["en"][0] for record in train}
    for record in test:
        points = set(record["key"].split("-"))
        assert points & TONES and points & TONES <= train_tones
        assert train_bases[base(record["key"])] >= 1
        assert record["captions"]["en"][0] not in train_names


def test_what_a_mirror_image_would_contradict_is_never_mirrored():
    mirror = {record["captions"]["en"][0]: record["mirror"] for record in records("all")}
    for name in ("Japan", "left arrow", "keycap 7", "ten-thirty", "input latin letters", "person running"):
        assert name in mirror
    for name in ("Japan", "left arrow", "keycap 7", "ten-thirty", "input latin letters", "right-facing fist"):
        assert not mirror[name], name
    two_tones = "people holding hands light skin tone dark skin tone"
    assert not mirror[two_tones]
    for name in ("dog face", "woman astronaut dark skin tone", "bicycle"):
        assert mirror[name], name
    assert sum(mirror.values()) > 2000


def test_classes_are_unicodes_subgroups_and_the_same_in_both_splits():
    train, test = records("train"), records("test")
    by_name = {record["captions"]["en"][0]: record for record in (*train, *test)}
    expected = {
        "dog face": ("Animals & Nature", "animal mammal", 32),
        "Japan": ("Flags", "country flag", 96),
        "keycap 7": ("Symbols", "keycap", 92),
        "waving hand": ("People & Body", "hand fingers open", 16),
        "waving hand dark skin tone": ("People & Body", "hand fingers open", 16),
        "couple with heart man man light skin tone": ("People & Body", "family", 30),
    }
    for name, wanted in expected.items():
        found = emoji_classes.class_of(by_name[name]["key"])
        assert (found.group, found.subgroup, found.number) == wanted
        assert by_name[name]["label"] == found.number
    labels = [{record["label"] for record in split} for split in (train, test)]
    assert labels[0] == set(range(98)) and len(labels[1]) == 15  # skin tones: people, and parts of them
    kinds = {record["label"]: emoji_classes.class_of(record["key"]) for record in train}
    assert len({kind.subgroup for kind in kinds.values()}) == 98
    assert [*dict.fromkeys(kinds[number].group for number in sorted(kinds))] == [
        *("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities"),
        *("Objects", "Symbols", "Flags"),
    ]


def test_names_of_classes_are_captions_only_where_they_are_asked_for():
    record = open_source("openmoji:group,subgroup,en", "test")[0]
    assert record["captions"] == {
        "group": ["People & Body"],
        "subgroup": [emoji_classes.class_of(record["key"]).subgroup],
        "en": open_source("openmoji:en", "test")[0]["captions"]["en"],
    }
    assert not {*open_source("openmoji", "test")[0]["captions"]} & {"group", "subgroup"}
    with pytest.raises(UserError, match='no language "groups"; known: en, .*, ar, group, subgroup'):
        open_source("openmoji:groups", "test")


@pytest.mark.parametrize(
    "entry, count",
    [
        (configs.linear_probe(source="openmoji:en"), 98),
        (configs.knn(source="openmoji:subgroup", class_caption="subgroup"), 98),
        (configs.few_shot(source="openmoji:group", class_caption="group"), 9),
    ],
)
def test_classifiers_learn_these_classes(entry, count):
    evaluator = EVALUATORS[entry.kind](entry)
    evaluator.open()
    assert evaluator._class_count == count


def test_zero_shot_classification_knows_their_names():
    for source, split, count in (("openmoji:subgroup", "test", 15), ("openmoji:group", "all", 9)):
        for make in (configs.zeroshot, configs.robustness):
            evaluator = EVALUATORS[make().kind](make(source=source, split=split))
            evaluator.open()
            assert len(set(evaluator._classes)) == len(evaluator._classes) == count
    with pytest.raises(UserError, match="one class 'People & Body'"):
        EVALUATORS["zeroshot"](configs.zeroshot(source="openmoji:group")).open()


def test_hold_out_keeps_another_tone_of_every_base():
    keys = ["1F44B-1F3FB", "1F44B-1F3FC", "1F590-1F3FB", "1F436"]
    assert openmoji.hold_out(keys, 10) <= {"1F44B-1F3FB", "1F44B-1F3FC"}
    assert len(openmoji.hold_out(keys, 10)) == 1


def test_a_damaged_file_is_noticed(openmoji_folder, tmp_path):
    for path in openmoji_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert openmoji.is_complete(tmp_path)
    (tmp_path / "test.array_record").write_bytes(b"cut short")
    assert not openmoji.is_complete(tmp_path)


def test_an_interrupted_build_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path))

    def interrupt(items, total, title):
        for index, item in enumerate(items):
            if index == 20:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        openmoji.prepare(interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write the data cache .*MMJAX_CACHE"):
        openmoji.prepare()


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(openmoji_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path))
    again = openmoji.prepare()
    checksums = [json.loads((folder / "manifest.json").read_text())["sha256"] for folder in (openmoji_folder, again)]
    assert checksums[0] == checksums[1]
