import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from mmjax import config as configs
from mmjax.data import image, pipeline, sources, text
from mmjax.data.augment import Augment
from mmjax.data.image_reader import Reader
from mmjax.errors import RecordError, UserError
from mmjax.validation import validate
from tests import tiny
from tests.programs import ROOT

flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
PLAIN = Augment(28, "squash", mirror=0.0)


@pytest.fixture(scope="module")
def source(openmoji_folder):
    return sources.open_source("openmoji", "test")


@pytest.fixture(scope="module")
def tokenizer(openmoji_folder):
    return text.load(sources.tokenizer_path("openmoji", ("en",)))


def drawn(source, tokenizer, start=0, steps=6, rows=None, config=None, **loader):
    config = config or tiny.get_config()
    config.loader.update(loader)
    opened = source if isinstance(source, dict) else {"": source}
    rows = {"train": np.arange(16) if rows is None else rows}
    return list(pipeline.train_batches(config, {"train": opened}, tokenizer, rows, start, steps))


def batches(*arguments, **options):
    return [batch for _, batch, _ in drawn(*arguments, **options)]


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() == {"image", "text"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def example(source, tokenizer, augment=PLAIN, choice=None, length=24):
    return pipeline.TrainExample((source,), augment, choice or pipeline.CaptionChoice(("en",)), tokenizer, length)


@pytest.mark.parametrize("loader", [{"threads": 1, "prefetch": 1}, {"threads": 8}, {"workers": 2}])
def test_threads_and_workers_change_no_batch(source, tokenizer, loader):
    assert_equal(batches(source, tokenizer), batches(source, tokenizer, **loader))


def test_a_later_start_yields_the_same_batches(source, tokenizer):
    assert_equal(batches(source, tokenizer)[4:], batches(source, tokenizer, start=4))


def test_the_rows_of_several_processes_make_up_the_same_batch(source, tokenizer):
    whole = batches(source, tokenizer)
    parts = [batches(source, tokenizer, rows=rows) for rows in ([0, 1, 2, 3], [8, 9, 10, 11, 4, 5], [6, 7, 12, 15])]
    for step, batch in enumerate(whole):
        for part, rows in zip(parts, ([0, 1, 2, 3], [8, 9, 10, 11, 4, 5], [6, 7, 12, 15]), strict=True):
            np.testing.assert_array_equal(part[step]["image"], batch["image"][rows])
            np.testing.assert_array_equal(part[step]["text"], batch["text"][rows])


def test_the_seed_and_the_epoch_change_the_order():
    def order(seed):
        dataset = pipeline.places([400], [], seed)
        return [dataset[element] for element in range(800)]

    first = order(0)
    assert first == order(0) and first != order(1)
    assert [index for _, _, index in first[:400]] != [index for _, _, index in first[400:]]
    for epoch in range(2):
        places = first[400 * epoch : 400 * (epoch + 1)]
        assert sorted(places) == [(0, epoch, index) for index in range(400)]  # none is lost or doubled


def test_a_mixture_has_exact_shares_and_its_sources_repeat():
    dataset = pipeline.places([10, 40, 5], [3.0, 2.0, 1.0], 0)
    counts = Counter()
    for element in range(600):
        number, epoch, index = dataset[element]
        counts[number] += 1
        assert epoch == (counts[number] - 1) // [10, 40, 5][number] and index < [10, 40, 5][number]
        for source_number, share in enumerate((3 / 6, 2 / 6, 1 / 6)):
            assert abs(counts[source_number] - share * (element + 1)) <= 1
    assert dataset[123_456_789_012] == pipeline.places([10, 40, 5], [3.0, 2.0, 1.0], 0)[123_456_789_012]


def test_the_shares_of_a_mixture_are_sizes_weights_and_upsampling(tokenizer):
    opened = {name: sources.open_source("openmoji", split) for name, split in (("few", "test"), ("many", "train"))}
    config = tiny.get_config()
    config.streams.train.source = ""
    config.streams.train.mixture = {"few": configs.component(split="test"), "many": configs.component()}

    def share(**few):
        config.streams.train.mixture.few.update(few)
        entry = config.streams.train
        dataset = pipeline.stream_dataset(entry, opened, tokenizer, config.model.encoders, 0, range(16))
        return sum(dataset.parents[0][element][0] == 0 for element in range(4000)) / 4000

    assert share() == pytest.approx(400 / 3944, abs=1e-3)
    assert share(upsampling=3.0) == pytest.approx(1200 / 4744, abs=1e-3)
    assert share(upsampling=1.0, weight=3544.0) == pytest.approx(0.5, abs=1e-3)


def test_augmentation_differs_between_epochs_and_never_mirrors_what_it_may_not(source, tokenizer):
    record = next(source[i] for i in range(400) if source[i]["mirror"])
    pixels = image.decode(record["image"])
    mirrored = Augment(112, "squash", mirror=1.0)
    for may, expected in ((False, pixels), (True, image.mirror(pixels))):
        made = example([record | {"mirror": may}], tokenizer, mirrored).batch([(0, 0, 0)], [np.random.default_rng(0)])
        np.testing.assert_array_equal(made["image"][0], expected)
    epochs = [batches(source, tokenizer, start=s, steps=s + 25) for s in (0, 25)]
    assert (epochs[0][0]["image"] != epochs[1][0]["image"]).any()


def test_decoded_images_in_memory_are_the_same_batches(source, tokenizer):
    config = tiny.get_config()
    config.streams.train.keep_decoded = True
    assert_equal(batches(source, tokenizer), batches(source, tokenizer, config=config))


RECORD = {"key": "k", "captions": {"alt": ["a"], "web": ["b", "c", "d"], "none": []}}


def chosen(choice, times=3000, record=RECORD):
    rng = np.random.default_rng(0)
    return Counter(choice(record, epoch, rng) for epoch in range(times))


def test_captions_are_chosen_as_asked():
    choice = pipeline.CaptionChoice
    assert set(chosen(choice())) == set("abcd")
    assert all(count == pytest.approx(750, rel=0.15) for count in chosen(choice()).values())
    assert set(chosen(choice(("web",)))) == set("bcd")
    weighted = chosen(choice(("alt", "web", "none", "missing"), (3.0, 1.0, 5.0, 5.0)))
    assert weighted["a"] == pytest.approx(2250, rel=0.05) and set(weighted) == set("abcd")
    assert set(chosen(choice(("alt", "web"), (0.0, 1.0)))) == set("bcd")
    with pytest.raises(RecordError, match="no caption in alt"):
        choice(("alt", "web"), (1.0, 0.0))(RECORD | {"captions": {"web": ["b"]}}, 0, np.random.default_rng(0))
    assert chosen(choice(choice="first")) == {"a": 3000}
    assert chosen(choice(("web", "alt"), choice="join")) == {"b c d a": 3000}
    assert [choice(choice="cycle")(RECORD, epoch, None) for epoch in range(5)] == ["a", "b", "c", "d", "a"]
    with pytest.raises(RecordError, match="record 'k' has no caption in xx; it has 'alt', 'web'"):
        choice(("xx",))(RECORD, 0, np.random.default_rng(0))


def test_a_stream_may_have_shorter_texts(source, tokenizer):
    config = tiny.get_config()
    config.streams.train.preprocess.text_length = 5
    short, full = batches(source, tokenizer, config=config)[0]["text"], batches(source, tokenizer)[0]["text"]
    assert short.shape == (16, 5) and full.shape == (16, 8)
    np.testing.assert_array_equal(short[:, :4][full[:, 4] == 0], full[:, :4][full[:, 4] == 0])


class Without:
    """A source whose records lack what is named, those of the given numbers or all."""

    fingerprint = "without"

    def __init__(self, source, what, numbers=None):
        self._source, self._what, self._numbers = source, what, numbers

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = self._source[index]
        if self._numbers is not None and index not in self._numbers:
            return record
        left = {key: value for key, value in record.items() if key != "image"}
        return record | {"captions": {}} if self._what == "text" else left


def with_stream(**options):
    config = tiny.get_config()
    config.streams.train.preprocess.captions = ("en",)
    config.streams.train.update(options)
    return config


@pytest.mark.parametrize("keep_decoded", [False, True])
def test_a_stream_of_images_needs_no_captions_and_one_of_text_no_images(source, tokenizer, keep_decoded):
    for inputs, missing in ((("image",), "text"), (("text",), "image")):
        config = with_stream(inputs=inputs, keep_decoded=keep_decoded)
        if missing == "text":
            del config.model.encoders.text
        else:
            del config.model.encoders.image
        made = drawn(Without(source, missing), tokenizer if missing == "image" else None, config=config)
        assert all(batch.keys() == {*inputs} and broken == [] for _, batch, broken in made)
        order = pipeline.places([400], [], 0)
        for step, (_, batch, _) in enumerate(made):
            of_batch = [source[order[16 * step + row][2]] for row in range(16)]
            if missing == "image":
                captions = [record["captions"]["en"][0] for record in of_batch]
                np.testing.assert_array_equal(batch["text"], tokenizer.encode(captions, 8))
            else:
                assert batch["image"].shape == (16, 28, 28, 3) and batch["image"].std(axis=(1, 2, 3)).min() > 0
        pipeline.check_readable(Without(source, missing), ("en",), inputs=inputs)
        with pytest.raises(UserError, match=f"has no {'caption in en' if missing == 'text' else missing}"):
            pipeline.check_readable(Without(source, missing), ("en",))


@pytest.mark.parametrize("workers", [0, 1])
def test_records_without_captions_are_used_where_captions_are_optional(source, tokenizer, workers):
    bare = set(range(0, 400, 3))
    some = Without(source, "text", bare)
    config = with_stream(captions_optional=True)
    config.streams.train.preprocess.caption_weights = (1.0,)
    whole = batches(source, tokenizer, config=config)
    made = drawn(some, tokenizer, config=config, workers=workers)
    order = pipeline.places([400], [], 0)
    for step, ((_, batch, broken), complete) in enumerate(zip(made, whole, strict=True)):
        expected = [order[16 * step + row][2] not in bare for row in range(16)]
        assert broken == [] and batch["has_text"].dtype == bool and batch["has_text"].tolist() == expected
        assert (batch["text"][~batch["has_text"]] == tokenizer.pad_id).all() and complete["has_text"].all()
        np.testing.assert_array_equal(batch["text"][expected], complete["text"][expected])
    assert all(any(broken) for _, _, broken in drawn(some, tokenizer)[:2])  # they are broken where captions are not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ()}, r"config.streams.train.inputs: \(\) is not one or both of image, text"),
        ({"inputs": ("text", "text")}, r"config.streams.train.inputs: \('text', 'text'\) is not one or both"),
        ({"inputs": ("image", "txet")}, 'config.streams.train.inputs: unknown "txet"; did you mean "text"?'),
        ({"inputs": (1,)}, r"config.streams.train.inputs: \(1,\) holds something else than names"),
        ({"inputs": ("image",), "captions_optional": True}, "config.streams.train.captions_optional: captions can be"),
    ],
)
def test_inputs_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        validate(with_stream(**options), 1)
    validate(with_stream(inputs=("text", "image"), captions_optional=True), 1)


class Damaged:
    """A source of which some records cannot be read, and some have no image or caption."""

    fingerprint = "damaged"

    def __init__(self, source, bad):
        self._source, self._bad = source, bad

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = self._source[index]
        if index not in self._bad:
            return record
        kind = index % 3
        if kind == 0:
            raise RecordError(f"record {record['key']!r} is gone")
        return record | ({"image": record["image"][:40]} if kind == 1 else {"captions": {}})


def test_unreadable_records_are_replaced_named_and_move_nothing_else(source, tokenizer):
    bad = set(range(0, 400, 7))
    whole = drawn(source, tokenizer, steps=25)
    damaged = drawn(Damaged(source, bad), tokenizer, steps=25)
    again = drawn(Damaged(source, bad), tokenizer, start=3, steps=25, threads=8)
    order = pipeline.places([400], [], 0)
    messages = []
    for step, ((_, one, _), (_, other, broken)) in enumerate(zip(whole, damaged, strict=True)):
        for row in range(16):
            same = (one["image"][row] == other["image"][row]).all() and (one["text"][row] == other["text"][row]).all()
            assert same == (order[16 * step + row][2] not in bad)
        messages += broken
    assert len(messages) >= len(bad)
    assert {source[index]["key"] for index in bad} == {message.split("'")[1] for message in messages}
    assert_equal([batch for _, batch, _ in damaged][3:], [batch for _, batch, _ in again])


def test_a_stream_without_one_readable_record_ends_with_an_error(source, tokenizer):
    with pytest.raises(UserError, match="stream train: 32 records in a row cannot be read: record '1F"):
        drawn(Damaged(source, set(range(400)) - {1, 2}), tokenizer)


def test_unreadable_evaluation_images_are_grey(source):
    damaged = Damaged(source, {0, 1})
    images, broken = pipeline.evaluation_images(damaged, Reader(28), range(3))
    assert (images[:2] == 128).all() and (images[2] != 128).any()
    assert len(broken) == 2 and "is gone" in broken[0] and "cannot be decoded" in broken[1]


def test_a_source_without_images_or_captions_is_told_before_the_run(source):
    pipeline.check_readable(source, ("en",))
    pipeline.check_readable(Damaged(source, set(range(399))), ("en",))  # one of those that are tried is good
    with pytest.raises(UserError, match="no record can be used: record '.*' is gone"):
        pipeline.check_readable(Damaged(source, set(range(400))), ("en",))
    with pytest.raises(UserError, match="no record can be used: record '.*' has no caption in txt; it has 'en', "):
        pipeline.check_readable(source, ("txt",))


def test_streams_alternate_by_weight():
    schedule = pipeline.stream_schedule({"images": 3.0, "videos": 1.0}, 400)
    assert schedule == pipeline.stream_schedule({"images": 3.0, "videos": 1.0}, 400)
    for step in range(1, 401):
        assert abs(schedule[:step].count("images") - 0.75 * step) <= 1


def test_two_streams_each_go_through_their_own_batches(source, tokenizer):
    config = tiny.get_config()
    config.streams.second = config.streams.train.copy_and_resolve_references()
    config.streams.second.batch_size = 8
    config.streams.second.weight = 0.5
    opened = {"train": {"": source}, "second": {"": source}}
    rows = {"train": np.arange(16), "second": np.arange(8)}
    all_of_them = list(pipeline.train_batches(config, opened, tokenizer, rows, 0, 9))
    assert Counter(name for name, _, _ in all_of_them) == {"train": 6, "second": 3}
    assert {len(batch["text"]) for name, batch, _ in all_of_them if name == "second"} == {8}
    resumed = list(pipeline.train_batches(config, opened, tokenizer, rows, 5, 9))
    for (name, batch, _), (again, same, _) in zip(all_of_them[5:], resumed, strict=True):
        assert name == again
        np.testing.assert_array_equal(batch["image"], same["image"])


def test_a_source_without_files_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        sources.open_source(f"array_record:{tmp_path}/*.array_record", "train")
    with pytest.raises(UserError, match='unknown source "laion"'):
        sources.open_source("laion", "train")
    with pytest.raises(UserError, match='source "csv" names no location; write csv:LOCATION'):
        sources.open_source("csv")
    with pytest.raises(UserError, match='no split "valid"; known: train, test, all'):
        sources.open_source("openmoji", "valid")


WORKERS = """
import os, sys
import numpy as np
from absl import flags
from mmjax.data import pipeline, sources, text
from tests import tiny

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    config = tiny.get_config()
    config.loader.workers = 2
    opened = {"train": sources.open_stream(config.streams.train)}
    tokenizer = text.load(sources.tokenizer_path("openmoji:en", ()))
    batches = pipeline.train_batches(config, opened, tokenizer, {"train": np.arange(16)}, 0, int(sys.argv[1]))
    kept = [next(batches)]
    print("started", flush=True)
    kept += batches if sys.argv[1] == "6" else [sys.stdin.readline()]
"""


@pytest.fixture
def worker_program(tmp_path, openmoji_folder):
    (tmp_path / "workers.py").write_text(WORKERS)

    def start(batch_count):
        command = [sys.executable, str(tmp_path / "workers.py"), str(batch_count)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, **pipes, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

    return start


def test_worker_processes_end_quietly(worker_program):
    output, _ = worker_program(6).communicate(timeout=300)
    assert output == "started\n"


def test_worker_processes_do_not_outlive_a_killed_run(worker_program):
    process = worker_program(1000)
    assert process.stdout.readline() == "started\n"
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
