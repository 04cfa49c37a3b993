"""Preparing data into an object store: the bytes of a local preparation, and going on where it was stopped."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from mmjax.errors import UserError
from mmjax.files import write_atomically
from tests import programs
from tests.data.test_duplicates import again, scene

pytest.importorskip("apache_beam", reason="the extra `prepare` is not installed")
pytest.importorskip("tensorflow_datasets", reason="the extra `prepare` is not installed")

from mmjax.data import preparation, preparation_plan
from mmjax.data import preparation_storage as storage
from mmjax.data.preparation_plan import Settings
from mmjax.data.sources import open_source
from tests.test_prepare import JsonLines

ROOT = "TEST_OBJECT_STORE"  # the environment variable with the folder in which the objects lie


class Upload(io.BytesIO):
    """An object that is there when it is closed."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def close(self):
        if not self.closed:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.target, self.getvalue())
        super().close()


class ObjectStore(fsspec.AbstractFileSystem):
    """Takes objects, refuses folders, and believes a listing for ever unless it is told to keep none."""

    protocol = "s3"
    opened: ClassVar[list[tuple[str, str]]] = []

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = self.listed(path)
        found = self.dircache[path] if path in self.dircache else self.listed(path)
        return found if detail else [entry["name"] for entry in found]

    def listed(self, path):
        place = self.place(path)
        if place.is_file():
            return [{"name": path, "size": place.stat().st_size, "type": "file"}]
        kinds = {True: "directory", False: "file"}
        return [
            {"name": f"{path}/{child.name}", "size": child.stat().st_size, "type": kinds[child.is_dir()]}
            for child in place.iterdir()
        ]

    def place(self, path):
        return Path(os.environ[ROOT]) / self._strip_protocol(path)

    def _open(self, path, mode="rb", **kwargs):
        self.opened.append((path, mode))
        return Upload(self.place(path)) if mode == "wb" else self.place(path).open(mode)

    def _rm(self, path):
        place = self.place(path)
        if place.is_dir():
            place.rmdir()
        else:
            place.unlink()

    def mkdir(self, path, create_parents=True, **kwargs):
        raise PermissionError("this would make a bucket")

    makedirs = mkdir


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The folder of the store that stands behind s3://."""
    fsspec.register_implementation("s3", ObjectStore, clobber=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ROOT, str(tmp_path_factory.mktemp("store")))
        patch.setenv("MMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ[ROOT])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """(settings, the folder of a local preparation): 21 records, of which 18 stay."""
    folder = tmp_path_factory.mktemp("local")
    data, evaluation = JsonLines(folder / "data"), JsonLines(folder / "evaluation")
    first = [data.add(scene(seed), [f"scene {seed}"]) for seed in range(18)]
    data.add(first[2], ["another caption"])
    data.add(again(scene(3)))
    data.add(evaluation.add(scene(30)))
    settings = Settings(data.source, exclude=((evaluation.source, "", ""),), name="both", shards=4)
    preparation.prepare(settings, folder / "out")
    return settings, folder / "out"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_store_gets_the_bytes_of_a_local_folder(local, store):
    settings, out = local
    manifest, was_there = preparation.prepare(settings, "s3://bucket/same")
    assert not was_there and manifest["out"] == 18
    assert contents(store / "bucket" / "same") == contents(out)
    state, local_state = store / "bucket" / "same" / ".prepare", out / ".prepare"
    assert contents(state) == {name: data for name, data in contents(local_state).items() if name != "lock"}
    assert contents(state / "shards") == contents(local_state / "shards")
    assert sum(path.endswith("kept.npy") and mode == "rb" for path, mode in ObjectStore.opened) == 1
    assert preparation.prepare(settings, "s3://bucket/same/") == (manifest, True)
    read, expected = (
        open_source(f"array_record:{place}/*.array_record*") for place in ("s3://bucket/same", os.fspath(out))
    )
    assert [read[index] for index in range(18)] == [expected[index] for index in range(len(expected))]


def test_a_stopped_preparation_goes_on_in_the_store(local, store, monkeypatch):
    monkeypatch.setattr(preparation_plan, "_CHUNK", 4)
    settings, out = local
    address, objects = "s3://bucket/stopped", store / "bucket" / "stopped"

    @contextlib.contextmanager
    def stop(title, total, done):
        if title == stop_at:
            raise KeyboardInterrupt
        yield

    stop_at = "comparing images"
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(settings, address, watch=stop)
    scanned = sorted((objects / ".prepare" / "scan").iterdir())
    assert len(scanned) == 7
    scanned[2].unlink()
    times = {path: path.stat().st_mtime_ns for path in scanned if path.exists()}
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(settings, address, watch=stop)
    assert scanned[2].exists() and times == {path: path.stat().st_mtime_ns for path in times}
    stop_at = "writing records"
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(settings, address, watch=stop)
    stop_at = ""
    preparation.prepare(settings, address, watch=stop)
    assert contents(objects) == contents(out)

    lost, cut, *whole = sorted(objects.glob("*.array_record*"))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:1000])
    times = {path: path.stat().st_mtime_ns for path in whole}
    assert not preparation.prepare(settings, address, watch=stop)[1]
    assert contents(objects) == contents(out) and times == {path: path.stat().st_mtime_ns for path in times}


def test_progress_counts_what_is_in_the_store(local, store, monkeypatch):
    monkeypatch.setattr(storage, "_LIST_SECONDS", 0)
    settings, _ = local
    counted = {}

    @contextlib.contextmanager
    def watch(title, total, done):
        before = done()
        yield
        counted[title] = (before, done(), total)

    preparation.prepare(settings, "s3://bucket/progress", watch=watch)
    assert counted["reading chunks of records"] == (0, 2, 2)
    assert counted["writing records"] == (0, 18, 18)


def test_what_goes_wrong_is_told_in_one_line(local, store, monkeypatch):
    settings, _ = local
    (store / "bucket" / "full").mkdir(parents=True)
    (store / "bucket" / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"^s3://bucket/full holds thesis\.tex, "):
        preparation.prepare(settings, "s3://bucket/full")

    open_object = ObjectStore._open

    def refuse(self, path, mode="rb", **kwargs):
        if mode == "wb" and refused in path:
            raise RuntimeError("Access\nDenied")
        return open_object(self, path, mode, **kwargs)

    monkeypatch.setattr(ObjectStore, "_open", refuse)
    for refused in ("settings.json", "/scan/", "/pairs/", "summary.json", "array_record", "features.json"):
        named = "" if refused == "features.json" else f"[^\n]*{refused}[^\n]*"  # TFDS writes that one
        with pytest.raises(UserError, match=f"^cannot write s3://bucket/refused{named}: Access Denied[^\n]*$"):
            preparation.prepare(settings, "s3://bucket/refused")
    assert not list((store / "bucket" / "refused").glob("manifest.json"))


def test_folders_that_cannot_be_reached(local, monkeypatch):
    settings, _ = local
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^OUT gs://bucket/out needs one more package: pip install gcsfs$"):
        preparation.prepare(settings, "gs://bucket/out")
    for address in ("hdfs://host/out", "s3://", "://out"):
        with pytest.raises(UserError, match=f"^OUT {address}: a folder of this machine, or one of gs://BUCKET/FOLDER"):
            preparation.prepare(settings, address)


def test_the_program_reports_where_the_shards_are_and_needs_no_tensorflow(local, store):
    settings, out = local
    code = """
import runpy, sys
import fsspec
from tests.data.test_preparation_storage import ObjectStore
fsspec.register_implementation("s3", ObjectStore, clobber=True)
sys.argv = ["prepare", *sys.argv[1:]]
try:
    runpy.run_module("mmjax.prepare", run_name="__main__")
finally:
    assert "tensorflow" not in sys.modules
"""
    arguments = (settings.source, "s3://bucket/both", f"--exclude={settings.exclude[0][0]}", "--shards=4")
    command = [sys.executable, "-c", code, *arguments, "--workers=2"]
    ended = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert "what happened: s3://bucket/both/manifest.json" in ended.stderr
    assert "source='array_record:s3://bucket/both/*.array_record*'" in ended.stderr
    assert "tfds.builder_from_directory" not in ended.stderr
    assert contents(store / "bucket" / "both") == contents(out)
