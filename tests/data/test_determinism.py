"""The same batches, whoever loads them: every format, and a mixture of them all."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from mmjax import config as configs
from mmjax.data import pipeline, sources, text
from tests import tiny
from tests.data import samples
from tests.programs import ROOT

flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
KINDS = ("folder", "jsonl", "csv", "webdataset", "parquet", "arrow", "array_record", "tfds")
STEPS = 7  # of 16 rows: nearly four epochs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return samples.write_all(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    text.train_bpe([caption for number in range(samples.COUNT) for caption in samples.captions(number)], 300, path)
    return text.load(path)


def config_of(written, kinds):
    config = tiny.get_config()
    config.streams.train.preprocess.captions = ()
    config.streams.train.preprocess.caption_choice = "cycle"
    if len(kinds) == 1:
        config.streams.train.source, config.streams.train.split = written[kinds[0]], "train"
    else:
        config.streams.train.source = ""
        config.streams.train.mixture = {
            kind: configs.component(source=written[kind], upsampling=1.0 + number) for number, kind in enumerate(kinds)
        }
    return config


def drawn(config, tokenizer, start=0, rows=range(16), **loader):
    config.loader.update(loader)
    opened = {"train": sources.open_stream(config.streams.train)}
    batches = pipeline.train_batches(config, opened, tokenizer, {"train": np.array(rows)}, start, STEPS)
    return [(batch["image"], batch["text"]) for _, batch, _ in batches]


def assert_equal(one, two):
    assert len(one) == len(two)
    for (image, ids), (other_image, other_ids) in zip(one, two, strict=True):
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(ids, other_ids)


def assert_deterministic(config, tokenizer, whole):
    for count in (2, 4):  # as many processes, each with its rows
        parts = [drawn(config, tokenizer, rows=range(part, 16, count)) for part in range(count)]
        for part, batches in enumerate(parts):
            assert_equal(batches, [(image[part::count], ids[part::count]) for image, ids in whole])
    assert_equal(drawn(config, tokenizer, start=3, threads=5), whole[3:])
    # Resumed by four processes.
    assert_equal(drawn(config, tokenizer, start=5, rows=range(1, 16, 4)), [(i[1::4], t[1::4]) for i, t in whole[5:]])


def test_every_format_gives_the_same_records(written):
    opened = {kind: sources.open_source(source, "train") for kind, source in written.items()}
    for kind, source in opened.items():
        assert len(source) == samples.COUNT, kind
        for number in range(samples.COUNT):
            record = source[number]
            assert record["image"] == samples.png(number), kind
            wanted = samples.captions(number)[: 1 if kind == "csv" else None]
            assert [caption for texts in record["captions"].values() for caption in texts] == wanted, kind
            assert record["label"] == samples.label(number) and record["mirror"], kind
    assert len({source.fingerprint for source in opened.values()}) == len(KINDS)
    assert {source.fingerprint for source in opened.values()} == {
        sources.open_source(source, "train").fingerprint for source in written.values()
    }


def test_a_stream_of_text_reads_no_images(written):
    for kind, source in written.items():
        entry = configs.stream(source=source, inputs=("text",))
        record, whole = sources.open_stream(entry)[""][3], sources.open_source(source, "train")[3]
        own_layout = kind in ("array_record", "tfds")
        assert record == {key: value for key, value in whole.items() if key != "image" or own_layout}
        assert record["captions"] == whole["captions"] != {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_gives_the_same_batches_to_any_number_of_processes_and_after_a_resume(written, tokenizer, kind):
    config = config_of(written, [kind])
    whole = drawn(config, tokenizer)
    assert len({image.tobytes() for image, _ in whole}) == STEPS
    assert_deterministic(config, tokenizer, whole)


LOAD = """
import sys
import numpy as np
from mmjax import config as configs
from mmjax.data import pipeline, sources, text
from tests.data.test_determinism import config_of, digests

if __name__ == "__main__":
    import json
    from absl import flags
    flags.FLAGS.mark_as_parsed()
    written, tokenizer, part, count, start, workers = json.loads(sys.argv[1])
    config = config_of(written, list(written))
    print(json.dumps(digests(config, text.load(tokenizer), start, range(part, 16, count), workers)))
"""


def digests(config, tokenizer, start, rows, workers):
    """One for each row of each batch."""
    batches = drawn(config, tokenizer, start, rows, workers=workers)
    return [
        [hashlib.sha256(pixels.tobytes() + ids.tobytes()).hexdigest() for pixels, ids in zip(*batch, strict=True)]
        for batch in batches
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count, start, workers", [(2, 0, 1), (4, 3, 0)])
def test_real_processes_load_their_rows_of_the_same_batches(written, tokenizer, tmp_path, count, start, workers):
    """As many processes as `count`, at once, with a cold cache each; four of them after a resume."""
    config = config_of(written, KINDS)
    whole = digests(config, tokenizer, start, range(16), 0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()["data"]))
    (tmp_path / "load.py").write_text(LOAD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MMJAX_CACHE": str(tmp_path / "cache")}
    processes = []
    for part in range(count):
        told = json.dumps([written, str(tmp_path / "tokenizer.json"), part, count, start, workers])
        command = [sys.executable, str(tmp_path / "load.py"), told]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    for part, process in enumerate(processes):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert json.loads(output.splitlines()[-1]) == [batch[part::count] for batch in whole]


@pytest.mark.slow
def test_a_mixture_of_every_source_gives_the_same_batches_to_any_number_of_workers(written, tokenizer):
    config = config_of(written, KINDS)
    whole = drawn(config, tokenizer)
    assert_deterministic(config, tokenizer, whole)
    for workers in (1, 2, 4):
        assert_equal(drawn(config, tokenizer, workers=workers), whole)
    assert_equal(
        drawn(config, tokenizer, start=2, rows=range(0, 16, 2), workers=2), [(i[::2], t[::2]) for i, t in whole[2:]]
    )
