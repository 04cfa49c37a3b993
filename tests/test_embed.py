"""Embedding a data set: `python -m mmjax.embed`."""

import json
import os
import signal
import time

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from mmjax import api, embedding
from mmjax.data.pipeline import decode_image
from mmjax.data.sources import open_source
from tests import programs
from tests.interop import whispers

ROWS, PARTS = 3944, 16  # all emoji, 256 in a part


@pytest.fixture(scope="module")
def run(tmp_path_factory, openmoji_folder):
    """The workdir of a run with checkpoints of the steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("embed") / "run"
    code, output = programs.run("main", "--config=tests/tiny.py:4", f"--workdir={workdir}")
    assert code == 0, output
    return workdir


def arguments(run, out, *flags):
    standard = ("--source=openmoji:en", "--split=all", "--part_rows=256", "--batch_size=64")
    return (f"--model={run}", f"--out={out}", *standard, *flags)  # the last of the same flags counts


def read(folder):
    """The columns of all parts, in order."""
    tables = [parquet.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    return {name: np.concatenate([table[name].to_pylist() for table in tables]) for name in tables[0].column_names}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """What an undisturbed run wrote."""
    folder = tmp_path_factory.mktemp("embed") / "whole"
    code, output = programs.run("embed", *arguments(run, folder))
    assert code == 0, output
    assert f"{folder} is whole (3,944 records in 16 parts)" in output
    return folder


@pytest.mark.slow
def test_embeddings_are_those_of_the_api(run, whole):
    found, model, source = read(whole), api.load(run), open_source("openmoji:en", "all")
    rows = [0, 1, 255, 256, 2000, ROWS - 1]
    records = [source[row] for row in rows]
    assert len(list(whole.glob("part-*.parquet"))) == PARTS and len(found["key"]) == ROWS
    assert found["key"][rows].tolist() == [record["key"] for record in records]
    assert found["caption"][rows].tolist() == [record["captions"]["en"][0] for record in records]
    assert found["valid"].all() and set(found["error"]) == {None}
    expected = {
        "image": model.encode_image([decode_image(record) for record in records]),
        "text": model.encode_text(found["caption"][rows].tolist()),
    }
    for modality, embeddings in expected.items():
        np.testing.assert_allclose(found[modality][rows], embeddings, atol=1e-5)
    assert parquet.read_schema(whole / "part-00000.parquet").field("image").type.list_size == 16
    described = json.loads((whole / "embed.json").read_text())
    assert described["model"] == str(run) and described["step"] == 4 and described["rows"] == ROWS
    assert described["modalities"] == {"image": 16, "text": 16}


@pytest.mark.slow
def test_what_is_stopped_goes_on_to_the_same_files(run, whole, tmp_path):
    out = tmp_path / "out"
    process = programs.start("embed", *arguments(run, out))
    while not list(out.glob("part-*.parquet")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and output.splitlines()[-1] == "interrupted", output
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 0 < len(before) < PARTS
    left = out / ".part-00003.parquet.0123"  # as one that is killed leaves it
    left.write_bytes(b"half")
    code, output = programs.run("embed", *arguments(run, out))
    assert code == 0, output
    assert contents(out) == contents(whole)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    code, output = programs.run("embed", *arguments(run, out))
    assert code == 0 and f"{out} is whole already: nothing to do" in output


@pytest.mark.slow
@pytest.mark.sharding
def test_eight_devices_find_what_one_does(run, whole, tmp_path):
    code, output = programs.run("embed", *arguments(run, tmp_path / "out"), devices=8)
    assert code == 0, output
    assert_same(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.sharding
def test_two_processes_share_the_parts(run, whole, tmp_path):
    processes = programs.start_several("embed", *arguments(run, tmp_path / "out"), devices=2, processes=2)
    outputs = programs.outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "is whole" in outputs[0] and "is whole" not in outputs[1]
    assert_same(tmp_path / "out", whole)


def assert_same(folder, other):
    found, expected = read(folder), read(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if name in ("image", "text"):
            np.testing.assert_allclose(found[name], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], values)


@pytest.fixture
def damaged(tmp_path):
    """Six records: whole, no image file, whole, no image in the file, no caption, whole."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(folder / name)
    (folder / names[1]).unlink()
    (folder / names[3]).write_bytes(b"no image")
    lines = [{"image": name, "caption": "" if name == names[4] else f"number {name}"} for name in names]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (f"--source=jsonl:{path}", f"--root={folder}", "--split=")


@pytest.mark.slow
def test_rows_that_cannot_be_read_are_marked_and_stay(run, damaged, tmp_path):
    out = tmp_path / "out"
    code, output = programs.run("embed", *arguments(run, out, *damaged, "--format=npy", "--part_rows=4"))
    assert code == 0, output
    assert "3 of 6 records could not be read" in output and output.count("cannot be read: ") == 3
    found = read(out)
    assert found["valid"].tolist() == [True, False, True, False, False, True]
    assert "1.png" in found["error"][1] and "has no caption" in found["error"][4] and found["error"][5] is None
    assert found["caption"][3:].tolist() == ["number 3.png", None, "number 5.png"]
    parts = {name: [np.load(out / f"part-0000{n}.{name}.npy") for n in (0, 1)] for name in ("image", "text")}
    norms = {name: np.linalg.norm(np.concatenate(arrays), axis=1) for name, arrays in parts.items()}
    np.testing.assert_allclose(norms["image"], [1, 0, 1, 0, 1, 1], atol=1e-5)
    np.testing.assert_allclose(norms["text"][[0, 2, 3, 4, 5]], [1, 1, 1, 0, 1], atol=1e-5)
    assert parts["image"][0].dtype == np.float32 and [len(array) for array in parts["text"]] == [4, 2]
    code, output = programs.run("embed", *arguments(run, tmp_path / "other", *damaged, "--max_broken_fraction=0.01"))
    assert code == 2 and "error: 3 of 6 records cannot be read, more than --max_broken_fraction=0.01 allows" in output


@pytest.mark.slow
def test_texts_alone_need_no_images(run, damaged, tmp_path):
    out = tmp_path / "out"
    code, output = programs.run("embed", *arguments(run, out, *damaged, "--modalities=text"))
    assert code == 0, output
    found = read(out)
    assert "image" not in found and found["valid"].tolist() == [True] * 4 + [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--step=2", "holds other embeddings: model {run}, step 4; asked for: model {run}, step 2"),
        ("--split=test", "holds other embeddings: source openmoji:en, split all; asked for: source openmoji:en, split"),
        ("--modalities=image", "holds other embeddings"),
        ("--part_rows=100", "part_rows 256; asked for: part_rows 100; take another folder"),
        ("--source=opnmoji", 'unknown source "opnmoji"'),
    ],
)
def test_other_embeddings_do_not_go_into_the_same_folder(run, whole, flag, message):
    before = contents(whole)
    code, output = programs.run("embed", *arguments(run, whole, flag))
    assert code == 2 and message.format(run=run) in output and len(output.strip().splitlines()) == 1, output
    assert contents(whole) == before


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--model=", "--model is missing: what `mmjax.load` takes"),
        ("--source=", "--source is missing"),
        ("--out=", "--out is missing"),
        ("--modalities=image,sound", '--modalities: unknown "sound"; known: image, text'),
        ("--format=csv", '--format: unknown "csv"; known: parquet, npy'),
        ("--batch_size=0", "--batch_size=0: the least is 1"),
        ("--batch=3", 'unknown flag --batch; did you mean "batch_size"?'),
        ("--max_broken_fraction=2", "--max_broken_fraction=2 is no fraction"),
        ("--out=gs://bucket/x", "has to be a folder of this machine"),
        ("--fields=picture=a", '--fields: "picture=a" is not image=FIELD'),
    ],
)
def test_wrong_flags_are_told_in_one_line(flag, message, tmp_path, openmoji_folder):
    code, output = programs.run("embed", *arguments(tmp_path / "none", tmp_path / "out", flag))
    assert code == 2 and message in output and len(output.strip().splitlines()) == 1, output
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_utf8_are_escaped(tmp_path):
    store = embedding.Store(tmp_path / "out", {"format": "parquet", "rows": 1, "part_rows": 1})
    key = os.fsdecode(b"caf\xe9.png")
    store.write(0, [embedding.Row(key, None, f"{key}: no image", ())], {"image": np.zeros((1, 4), np.float32)})
    found = parquet.read_table(store.path(0))
    assert found["key"].to_pylist() == ["caf\\udce9.png"] and found["error"].to_pylist() == ["caf\\udce9.png: no image"]


def test_a_model_of_neither_images_nor_texts_is_refused(tmp_path, openmoji_folder):
    model = whispers.write(tmp_path / "whisper", False)
    code, output = programs.run("embed", *arguments(model, tmp_path / "out"))
    assert code == 2 and "it embeds neither images nor texts" in output, output


@pytest.mark.slow
def test_a_folder_with_something_else_stays_as_it_is(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, output = programs.run("embed", *arguments(run, tmp_path))
    assert code == 2 and f"{tmp_path} is not empty, and no folder of embeddings" in output
    assert contents(tmp_path) == {"notes.txt": b"mine"}
