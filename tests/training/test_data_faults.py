"""Runs whose data are partly unreadable, or not the same any more."""

import json
import math

import jax
import pytest

from mmjax.data import records
from mmjax.data.sources import open_source
from mmjax.errors import UserError
from mmjax.training import setup
from mmjax.training.broken_records import BrokenRecords
from mmjax.training.checkpoint import Checkpoints
from mmjax.training.feedback import read_metrics
from tests import programs, tiny

SHARED = ("--config=tests/tiny.py:40", "--config.streams.train.split=", "--config.train.log_every=10")


def write(path, broken_share):
    """The test split's records, of which some images are cut short; returns the keys of these."""
    source, broken, packed = open_source("openmoji", "test"), [], []
    for index in range(len(source)):
        record = source[index]
        if math.floor((index + 1) * broken_share) > math.floor(index * broken_share):
            broken.append(record["key"])
            record["image"] = record["image"][: len(record["image"]) // 2]
        packed.append(records.encode(record))
    records.write(path, packed)
    return broken


def arguments(path, workdir):
    tokenizer = open_source("openmoji", "test").paths[0].rpartition("/")[0] + "/tokenizer.en.json"
    return (
        *SHARED,
        f"--config.streams.train.source=array_record:{path}",
        f"--config.model.encoders.text.tokenizer={tokenizer}",
        f"--workdir={workdir}",
    )


@pytest.mark.slow
def test_one_image_in_a_hundred_cut_short_a_run_finishes_and_names_them(tmp_path, openmoji_folder):
    broken = write(tmp_path / "data", 0.01)
    assert len(broken) == 4
    code, output = programs.run("main", *arguments(tmp_path / "data", tmp_path / "run"))
    assert code == 0, output
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    counted = lines[-1]["data/train_replaced_records"]
    assert 4 <= counted <= 8  # 640 rows: one and a half epochs
    named = [json.loads(line) for line in (tmp_path / "run" / "broken_records.0.jsonl").read_text().splitlines()]
    assert {line["error"].split("'")[1] for line in named} == set(broken)
    assert {line["stream"] for line in named} == {"train"}
    assert "records could not be read and were replaced" in output and "4 of them noted" in output


@pytest.mark.slow
def test_three_images_in_five_cut_short_end_the_run(tmp_path, openmoji_folder):
    write(tmp_path / "data", 0.6)
    code, output = programs.run("main", *arguments(tmp_path / "data", tmp_path / "run"))
    assert code == 2 and "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: stream train: ") and "more than config.loader.max_broken_fraction 0.05" in last
    assert "broken_records.0.jsonl names them; record '" in last and "cannot be decoded" in last


def test_few_records_are_no_verdict_and_many_are(tmp_path):
    broken = BrokenRecords(tmp_path, 0.05)
    broken.note("a", ["one"] * 8, 8)
    assert broken.check(["a", "b"]) == {"data/a_replaced_records": 8.0}
    broken.note("a", ["two", "three", "four"], 8)
    with pytest.raises(UserError, match="stream a: 11 of 27 records cannot be read"):
        broken.check(["a", "b"])
    assert "11 of 27" in broken.summary() and "4 of them noted" in broken.summary()


def test_a_resumed_run_refuses_other_data(tmp_path, openmoji_folder):
    write(tmp_path / "data", 0.0)
    config = tiny.get_config()
    config.streams.train.source, config.streams.train.split = f"array_record:{tmp_path / 'data'}", ""
    config.model.encoders.text.vocab_size = 512  # a vocabulary of these captions is learned
    run = setup.prepare(config, tmp_path / "run")
    with jax.set_mesh(run.mesh), Checkpoints(run.workdir, config) as checkpoints:
        state = run.make_state()
        at_step = state.replace(step=jax.numpy.int32(2))
        checkpoints.save(at_step, run.tokenizer.to_json(), run.fingerprints, {})
    (tmp_path / "moved").mkdir()
    (tmp_path / "data").rename(tmp_path / "moved" / "data")
    config.streams.train.source = f"array_record:{tmp_path / 'moved' / 'data'}"
    assert setup.prepare(config, run.workdir).fingerprints == run.fingerprints  # the same data at another place
    write(tmp_path / "moved" / "data", 0.01)
    with pytest.raises(UserError, match=r"config.streams.train.source: its data are not those that the run in"):
        setup.prepare(config, run.workdir)
