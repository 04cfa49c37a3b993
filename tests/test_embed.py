"""python -m mmjax.embed: rows in the source's order, in whole parts, on any devices, resumed, with broken records."""

import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest

from mmjax import api
from mmjax.data import pipeline
from mmjax.data.sources import open_source
from mmjax.training import loop
from tests import programs, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory, openmoji_folder):
    """A run of four steps."""
    workdir = tmp_path_factory.mktemp("embed") / "run"
    config = tiny.get_config("4")
    config.evaluators = {}
    assert loop.train(config, workdir) == 0
    return workdir


def embed(run, out, *flags, source="openmoji:en", devices=1, **extra):
    arguments = [f"--model={run}", f"--source={source}", "--split=test", f"--out={out}", "--rows=150", *flags]
    return programs.run("embed", *arguments, devices=devices, **extra)


def column(out, name):
    return np.concatenate([parquet.read_table(path)[name].to_pylist() for path in sorted(out.glob("*.parquet"))])


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("embed") / "whole"
    code, output = embed(run, out)
    assert code == 0 and f"{out}: 400 records" in output, output
    return out


def test_rows_are_the_models_embeddings_in_the_sources_order(run, whole):
    model, source = api.load(run), open_source("openmoji:en", "test")
    assert sorted(path.name for path in whole.iterdir()) == [
        "embed.json",
        *(f"part-0000{number}.parquet" for number in range(3)),
    ]
    records = [source[index] for index in range(len(source))]
    assert column(whole, "key").tolist() == [record["key"] for record in records]
    captions = [pipeline.captions_of(record)[0] for record in records]
    assert column(whole, "caption").tolist() == captions
    np.testing.assert_allclose(column(whole, "text"), model.encode_text(captions), atol=1e-5)
    images = model.encode_image([pipeline.decode_image(record) for record in records])
    np.testing.assert_allclose(column(whole, "image"), images, atol=1e-5)
    assert column(whole, "image_valid").all() and column(whole, "text_valid").all()


@pytest.mark.slow
def test_devices_and_formats_make_no_difference(run, whole, tmp_path):
    code, output = embed(run, tmp_path / "eight", "--format=npy", "--batch_size=64", devices=8)
    assert code == 0, output
    for name in ("image", "text"):
        found = np.concatenate([np.load(path) for path in sorted((tmp_path / "eight").glob(f"*.{name}.npy"))])
        np.testing.assert_allclose(found, column(whole, name), atol=1e-5)
    beside = json.loads((tmp_path / "eight" / "part-00001.json").read_text())
    assert beside["key"] == column(whole, "key")[150:300].tolist()


def test_a_run_that_was_stopped_goes_on(run, whole, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(whole, out)
    (out / "part-00001.parquet").unlink()  # as after a kill: parts are whole or absent
    before = (out / "part-00000.parquet").stat().st_mtime_ns
    code, output = embed(run, out)
    assert code == 0 and "2 of 3 parts are there already" in output, output
    assert (out / "part-00000.parquet").stat().st_mtime_ns == before
    assert (out / "part-00001.parquet").read_bytes() == (whole / "part-00001.parquet").read_bytes()


def test_what_cannot_be_read_is_told_and_marked(run, tmp_path):
    from tests.data import samples

    lines = []
    for number in range(4):
        name = f"{number}.png"
        (tmp_path / name).write_bytes(samples.png(number) if number != 2 else b"no image")
        lines.append(json.dumps({"image": name, "caption": f"number {number}"}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    code, output = embed(run, tmp_path / "out", source=f"jsonl:{tmp_path / 'list.jsonl'}")
    assert code == 0 and "4 records, 1 of them with something that cannot be read" in output, output
    assert "cannot be decoded" in output
    assert column(tmp_path / "out", "image_valid").tolist() == [True, True, False, True]
    assert column(tmp_path / "out", "text_valid").all()
    norms = np.linalg.norm(column(tmp_path / "out", "image"), axis=1)
    np.testing.assert_allclose(norms, [1, 1, 0, 1], atol=1e-5)


def test_mistakes_are_one_line(run, whole, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for arguments, message in (
        ((f"--model={run}", "--source=openmoji:en"), "--out is missing"),
        ((f"--model={tmp_path / 'none'}", "--source=openmoji:en", "--out=x"), "none is no workdir of a run"),
        ((f"--model={run}", "--source=openmojis", "--out=x"), 'unknown source "openmojis"'),
        (
            (f"--model={run}", "--source=openmoji:en", "--out=x", "--modalities=video"),
            "embeds image and text, and no video",
        ),
        (
            (f"--model={run}", "--source=openmoji:en", f"--out={tmp_path / 'full'}"),
            "is not empty, and holds no embeddings",
        ),
        ((f"--model={run}", "--source=openmoji:en", f"--out={whole}"), "holds embeddings with another"),
    ):
        code, output = programs.run("embed", *arguments)
        assert code == 2 and message in output and "Traceback" not in output, output
