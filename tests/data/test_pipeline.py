import itertools
from collections import Counter

import numpy as np
import pytest
from absl import flags

from mmjax.data import image, pipeline, sources, text
from mmjax.errors import UserError
from tests import tiny

flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it


@pytest.fixture(scope="module")
def source(openmoji_folder):
    return sources.open_source("openmoji", "test")


@pytest.fixture(scope="module")
def tokenizer(openmoji_folder):
    return text.load(sources.tokenizer_path("openmoji", ("en",)))


def batches(source, tokenizer, start=0, steps=6, rows=None, **loader):
    config = tiny.get_config()
    config.loader.update(loader)
    rows = np.arange(16) if rows is None else rows
    return [
        batch
        for _, batch in pipeline.train_batches(config, {"train": source}, tokenizer, {"train": rows}, start, steps)
    ]


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for name in ("image", "text"):
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("loader", [{"threads": 1, "prefetch": 1}, {"threads": 8}, {"workers": 1}, {"workers": 2}])
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


def test_the_seed_and_the_epoch_change_the_order(source, tokenizer):
    example = lambda record, rng: record["key"]  # noqa: E731
    rows = range(16)

    def order(seed):
        dataset = pipeline.stream_dataset(source, example, seed, 16, rows)
        return [key for index in range(50) for key in dataset[index]]

    first = order(0)
    assert first == order(0) and first != order(1)
    assert first[:400] != first[400:]


def test_no_record_is_lost_or_doubled_in_an_epoch(source, tokenizer):
    """400 records, batches of 16: 25 batches an epoch, read by eight threads."""
    import grain

    dataset = pipeline.stream_dataset(source, lambda record, rng: record["key"], 0, 16, range(16))
    stream = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=8)))
    counts = Counter(key for batch in itertools.islice(stream, 50) for key in batch)
    assert set(counts.values()) == {2} and len(counts) == 400


def test_augmentation_differs_between_epochs_and_never_mirrors_what_it_may_not(source, tokenizer):
    example = pipeline.TrainExample(tokenizer, ("en",), 112, 8, 1.0, 1.0, mirror=1.0)
    record = next(source[i] for i in range(400) if source[i]["mirror"])
    fixed = record | {"mirror": False}
    pixels = image.decode(record["image"])
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(example(fixed, rng)["image"], pixels)
    np.testing.assert_array_equal(example(record, rng)["image"], image.mirror(pixels))
    epochs = [batches(source, tokenizer, start=s, steps=s + 25) for s in (0, 25)]
    assert (epochs[0][0]["image"] != epochs[1][0]["image"]).any()


def test_decoded_images_in_memory_are_the_same_batches(source, tokenizer):
    kept = pipeline.DecodedInMemory(source)
    assert_equal(batches(source, tokenizer), batches(kept, tokenizer))


def test_all_languages_are_drawn_and_a_missing_one_is_named(source, tokenizer):
    example = pipeline.TrainExample(tokenizer, ("en", "ja"), 28, 24, 1.0, 1.0, 0.0)
    drawn = {example(source[0], np.random.default_rng(seed))["text"].tobytes() for seed in range(20)}
    assert len(drawn) == 2
    with pytest.raises(UserError, match="has no caption in xx; it has en"):
        pipeline.captions_of(source[0], ["xx"])


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
    opened = {"train": source, "second": source}
    rows = {"train": np.arange(16), "second": np.arange(8)}
    drawn = list(pipeline.train_batches(config, opened, tokenizer, rows, 0, 9))
    assert Counter(name for name, _ in drawn) == {"train": 6, "second": 3}
    assert {len(batch["text"]) for name, batch in drawn if name == "second"} == {8}
    resumed = list(pipeline.train_batches(config, opened, tokenizer, rows, 5, 9))
    for (name, batch), (again, same) in zip(drawn[5:], resumed, strict=True):
        assert name == again
        np.testing.assert_array_equal(batch["image"], same["image"])


def test_a_source_without_files_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        sources.open_source(f"array_record:{tmp_path}/*.array_record", "train")
    with pytest.raises(UserError, match='unknown source "laion"'):
        sources.open_source("laion", "train")
    with pytest.raises(UserError, match='no split "valid"; known: train, test, all'):
        sources.open_source("openmoji", "valid")
