"""Preparing data: what is dropped and why, what is written, and going on where it was stopped."""

import contextlib
import fcntl
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mmjax.errors import UserError
from tests import programs
from tests.data.test_duplicates import again, scene

pytest.importorskip("apache_beam", reason="the extra `prepare` is not installed")
pytest.importorskip("tensorflow_datasets", reason="the extra `prepare` is not installed")

from mmjax.data import image, preparation, preparation_plan
from mmjax.data.preparation_plan import Settings
from mmjax.data.sources import open_source

PHOTOGRAPHS = Path(__file__).parents[1].parent / "shared" / "data" / "flickr8k_dev.tar"


class JsonLines:
    """Writes images and their list."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.rows = folder, []

    @property
    def source(self):
        (self.folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return f"jsonl:{self.folder / 'list.jsonl'}"

    def add(self, pixels, captions=("a caption",), suffix=".jpg"):
        name = f"{len(self.rows):03d}{suffix}"
        if isinstance(pixels, bytes):
            (self.folder / name).write_bytes(pixels)
        elif pixels is not None:
            Image.fromarray(pixels).save(self.folder / name, quality=90)
        self.rows.append({"image": name, "captions": list(captions)})
        return (self.folder / name).read_bytes() if pixels is not None else b""


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """(source, evaluation source, rows that stay): every reason for dropping occurs."""
    folder = tmp_path_factory.mktemp("messy")
    evaluation = JsonLines(folder / "evaluation")
    for seed in (100, 101):
        evaluation.add(scene(seed), captions=())
    evaluation.add(b"no image")
    data = JsonLines(folder / "data")
    good = [data.add(scene(seed), [f"scene {seed}", "second caption"]) for seed in range(12)]
    data.add(good[3])  # 12: the same bytes
    data.add(image.decode(good[4]), suffix=".png")  # 13: the same pixels
    data.add(again(scene(5)))  # 14: re-encoded
    data.add(cv2.resize(scene(6), None, fx=1.2, fy=1.2, interpolation=cv2.INTER_CUBIC))  # 15
    data.add(scene(7) + np.uint8(20))  # 16: brighter
    white = data.add(np.full((40, 40, 3), 255, np.uint8))  # 17
    data.add(np.full((40, 40, 3), 250, np.uint8))  # 18: flat as well, but another
    data.add(white)  # 19
    data.add(b"\xff\xd8\xff no image")  # 20
    data.add(None)  # 21: no such file
    data.add(scene(20)[:8, :8])  # 22
    data.add(scene(21)[:20])  # 23: 20 x 160 pixels
    data.add(scene(22), captions=())  # 24
    data.add(scene(23), captions=("", " "))  # 25
    data.add(scene(24), captions=("x" * 101,))  # 26
    data.add(scene(25), captions=("x" * 101, "short enough"))  # 27
    data.add((evaluation.folder / "000.jpg").read_bytes())  # 28
    data.add(again(scene(101), 50))  # 29
    return data.source, evaluation.source, [*range(12), 17, 18, 27]


SETTINGS = {"max_caption": 100, "max_aspect": 7.5, "shards": 4, "name": "messy"}
DROPPED = {
    "cannot be read": 2,
    "image too small": 1,
    "image too elongated": 1,
    "no caption": 2,
    "captions too short or too long": 1,
    "occurs in an excluded source": 2,
    "the same image as an earlier record": 3,
    "nearly the same image as an earlier record": 3,
}


@pytest.fixture(scope="module")
def prepared(messy, tmp_path_factory):
    source, evaluation, _ = messy
    out = tmp_path_factory.mktemp("prepared") / "out"
    manifest, was_there = preparation.prepare(Settings(source, exclude=((evaluation, "", ""),), **SETTINGS), out)
    assert not was_there
    return out, manifest


def counts(manifest):
    return {reason: dropped["records"] for reason, dropped in manifest["dropped"].items()}


def shard_digests(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.array_record*")}


def test_records_are_dropped_for_the_right_reasons(prepared):
    _, manifest = prepared
    assert counts(manifest) == DROPPED
    assert manifest["unreadable_in_excluded"] == 1
    assert manifest["in"] == 30 and manifest["out"] == 15 == 30 - sum(DROPPED.values())
    assert all(len(dropped["examples"]) == min(3, dropped["records"]) for dropped in manifest["dropped"].values())


def test_the_rest_is_written_in_order_with_the_captions_of_equal_images(messy, prepared):
    source, _, stays = messy
    original, written = open_source(source), open_source(f"array_record:{prepared[0]}/*.array_record*")
    assert len(written) == len(stays)
    for position, index in enumerate(stays):
        expected = original[index]
        if index == 27:
            expected["captions"] = {"captions": ["short enough"]}
        if index in (3, 4):  # 12 and 13 are the same images, with another caption; 19 is 17 with the same one
            expected["captions"]["captions"].append("a caption")
        assert written[position] == expected


def test_the_manifest_describes_the_shards(prepared):
    out, manifest = prepared
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == shard_digests(out)
    assert [shard["file"] for shard in manifest["shards"]] == [
        f"messy-train.array_record-{number:05d}-of-00004" for number in range(4)
    ]
    assert sum(shard["records"] for shard in manifest["shards"]) == 15
    assert manifest["settings"]["max_caption"] == 100 and manifest["versions"]["apache-beam"]
    assert sorted(path.name for path in out.iterdir() if "array_record" not in path.name) == [
        ".prepare",
        "dataset_info.json",
        "features.json",
        "manifest.json",
    ]


def test_tfds_reads_the_folder_without_tensorflow(messy, prepared):
    code = """
import sys
import tensorflow_datasets as tfds
data = tfds.builder_from_directory(sys.argv[1]).as_data_source(
    "train", decoders={"image": tfds.decode.SkipDecoding()})
def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)
for record in data:
    print([text(record["key"]), len(record["image"]), [text(t) for t in record["captions"]["text"]]])
assert "tensorflow" not in sys.modules
"""
    output = subprocess.run(
        [sys.executable, "-c", code, str(prepared[0])], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    written = open_source(f"array_record:{prepared[0]}/*.array_record*")
    expected = [written[index] for index in range(len(written))]
    assert output == [str([record["key"], len(record["image"]), record["captions"]["captions"]]) for record in expected]


def test_a_finished_folder_is_left_alone_and_another_preparation_refused(messy, prepared):
    source, evaluation, _ = messy
    out, manifest = prepared
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
    same = Settings(source, exclude=((evaluation, "", ""),), **SETTINGS)
    assert preparation.prepare(same, out) == (manifest, True)
    with pytest.raises(UserError, match="was begun with shards 4, not 5"):
        preparation.prepare(Settings(source, exclude=((evaluation, "", ""),), **SETTINGS | {"shards": 5}), out)
    with pytest.raises(UserError, match="was begun with exclude "):
        preparation.prepare(Settings(source, **SETTINGS), out)
    with (out / ".prepare" / "lock").open("w") as lock, pytest.raises(UserError, match="another process is preparing"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        preparation.prepare(same, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}


def test_a_lost_shard_is_written_again(messy, tmp_path):
    source, _, _ = messy
    out = tmp_path / "out"
    settings = Settings(source, shards=3)
    preparation.prepare(settings, out)
    digests = shard_digests(out)
    lost, cut, whole = sorted(out.glob("*.array_record*"))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:1000])
    time_before = whole.stat().st_mtime_ns
    _, was_there = preparation.prepare(settings, out)
    assert not was_there and shard_digests(out) == digests and whole.stat().st_mtime_ns == time_before


@pytest.mark.parametrize(
    "changes, kept",
    [({"near_distance": -1}, {14, 15, 16, 29}), ({"min_side": 8}, {22}), ({"keep_uncaptioned": True}, {24, 25, 26})],
)
def test_settings_decide_what_is_dropped(messy, tmp_path, changes, kept):
    source, evaluation, stays = messy
    settings = Settings(source, exclude=((evaluation, "", ""),), **SETTINGS | changes)
    preparation.prepare(settings, tmp_path / "out")
    original, written = open_source(source), open_source(f"array_record:{tmp_path}/out/*.array_record*")
    keys = [original[index]["key"] for index in sorted({*stays, *kept})]
    assert [written[index]["key"] for index in range(len(written))] == keys


def test_large_images_are_shrunk_and_small_ones_keep_their_bytes(tmp_path):
    data = JsonLines(tmp_path / "data")
    large, small = data.add(scene(0, 300, 400)), data.add(scene(1, 64, 90))
    preparation.prepare(Settings(data.source, short_side=64), tmp_path / "out")
    written = open_source(f"array_record:{tmp_path}/out/*.array_record*")
    shrunk = image.decode(written[0]["image"])
    assert shrunk.shape == (64, 85, 3) and written[0]["image"][:3] == b"\xff\xd8\xff"
    expected = cv2.resize(image.decode(large), (85, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(int) - expected).mean() < 4
    assert written[1]["image"] == small


def test_an_excluded_source_needs_images_that_can_be_read(tmp_path):
    data, evaluation = JsonLines(tmp_path / "data"), JsonLines(tmp_path / "evaluation")
    data.add(scene(1))
    data.add(scene(2))
    evaluation.add(scene(2))
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "list.jsonl"
    path.write_bytes((evaluation.folder / "list.jsonl").read_bytes() if evaluation.source else b"")
    with pytest.raises(UserError, match="no image of the excluded source jsonl:.* can be read: cannot read '000.jpg'"):
        preparation.prepare(Settings(data.source, exclude=((f"jsonl:{path}", "", ""),)), tmp_path / "out")
    settings = Settings(data.source, exclude=((f"jsonl:{path}", "", str(evaluation.folder)),))
    assert preparation.prepare(settings, tmp_path / "other")[0]["out"] == 1


def test_nothing_left_and_folders_that_cannot_be_used(messy, tmp_path):
    source, _, _ = messy
    with pytest.raises(UserError, match="no record of .* is left: image too small"):
        preparation.prepare(Settings(source, min_side=1000), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        preparation.prepare(Settings(source), tmp_path / "full")
    with pytest.raises(UserError, match="cannot write into"):
        preparation.prepare(Settings(source), tmp_path / "full" / "thesis.tex" / "out")


def test_data_that_changes_between_scan_and_writing_is_told_in_one_line(tmp_path):
    data = JsonLines(tmp_path / "data")
    data.add(scene(0))

    @contextlib.contextmanager
    def watch(title, total, done):
        if title == "writing records":
            (data.folder / "000.jpg").unlink()
        yield

    with pytest.raises(UserError, match=r"^[^\n]*000\.jpg[^\n]*$"):
        preparation.prepare(Settings(data.source), tmp_path / "out", watch=watch)
    assert not list((tmp_path / "out").glob("*.array_record*"))


def test_a_scan_goes_on_where_it_was_stopped(messy, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation_plan, "_CHUNK", 4)
    source, evaluation, _ = messy
    out, settings = tmp_path / "out", Settings(source, exclude=((evaluation, "", ""),), **SETTINGS)
    seen = []

    @contextlib.contextmanager
    def watch(title, total, done):
        if title != "reading chunks of records":
            seen.append({path.name: path.stat().st_mtime_ns for path in (out / ".prepare" / "scan").glob("*.json")})
            if len(seen) == 1:
                raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(settings, out, watch=watch)
    (out / ".prepare" / "scan" / "0-000000000008.json").unlink()
    manifest, _ = preparation.prepare(settings, out, watch=watch)
    changed = [name for name in seen[0] if seen[0][name] != seen[1][name]]
    assert len(seen[0]) == 9 and changed == ["0-000000000008.json"]
    assert manifest["shards"] == prepared[1]["shards"] and counts(manifest) == DROPPED


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Images that take their time, and what becomes of them where nothing interrupts."""
    folder = tmp_path_factory.mktemp("large")
    data = JsonLines(folder / "data")
    for seed in range(144):
        data.add(cv2.resize(scene(seed), (1600, 1200)))
    arguments = (data.source, "--name=large", "--shards=48", "--short_side=64", "--workers=1")
    code, output = programs.run("prepare", arguments[0], folder / "out", *arguments[1:])
    assert code == 0, output
    return arguments, shard_digests(folder / "out"), output


def test_the_report_says_how_to_go_on(large):
    _, _, output = large
    assert "--config.streams.train.source='array_record:" in output and "tfds.builder_from_directory(" in output
    assert "144" in output and "manifest.json" in output


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_stopped_while_writing_and_started_again(large, tmp_path, sign):
    (source, *flags), digests, _ = large
    out = tmp_path / "out"
    process = programs.start("prepare", source, out, *flags)
    deadline = time.monotonic() + 60
    while not list(out.glob("large-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(sign)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == (-9 if sign == signal.SIGKILL else 130), output
    assert "Traceback" not in output
    there = shard_digests(out)
    assert 0 < len(there) < 48 and there.items() <= digests.items()
    times = {path: path.stat().st_mtime_ns for path in sorted(out.glob("large-*"))[:-1]}
    code, output = programs.run("prepare", source, out, *flags)
    assert code == 0, output
    assert shard_digests(out) == digests and not (out / ".prepare" / "partial").exists()
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "SOURCE is missing"),
        (("jsonl:x",), "OUT is missing"),
        (("jsonl:x", "{out}", "more"), 'unexpected argument "more"'),
        (("jsonl:/nowhere/x.jsonl", "{out}"), "/nowhere/x.jsonl"),
        (("jsonk:x", "{out}"), 'unknown source "jsonk:x"'),
        (("jsonl:x", "{out}", "--short_sid=3"), 'did you mean "short_side"?'),
        (("jsonl:x", "{out}", "--near_distance=20"), "--near_distance=20"),
        (("jsonl:x", "{out}", "--fields=picture=x"), '"picture=x" is not image=FIELD'),
        (("jsonl:x", "{out}", "--out_split=a-b"), "--out_split=a-b"),
        (("jsonl:x", "{out}", "--exclude=jsonl:y", "--exclude_split=a", "--exclude_split=b"), "2 of them for 1 times"),
        (("jsonl:x", "ftp://host/out"), "OUT ftp://host/out: a folder of this machine, or one of gs://BUCKET/FOLDER"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path):
    code, output = programs.run("prepare", *(argument.format(out=tmp_path / "out") for argument in arguments))
    assert code == 2 and message in output and "Traceback" not in output, output
    assert [line.startswith("error: ") for line in output.strip().splitlines()] == [True], output


@pytest.mark.parametrize("runner", ["FlinkRunnr", "no_such_package.Runner"])
def test_a_runner_that_is_not_there_is_told_in_one_line(runner, tmp_path):
    data = JsonLines(tmp_path / "data")
    data.add(scene(0))
    with pytest.raises(UserError, match=f"^runner {runner}: [^\n]*$"):
        preparation.prepare(Settings(data.source), tmp_path / "out", runner)


def test_a_full_disk_is_told_in_one_line_and_leaves_no_shard(tmp_path):
    data = JsonLines(tmp_path / "data")
    for seed in range(4):
        data.add(scene(seed, 300, 400))
    code = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = ["prepare", *sys.argv[1:]]
runpy.run_module("mmjax.prepare", run_name="__main__")
"""
    command = [sys.executable, "-c", code, data.source, str(tmp_path / "out"), "--shards=1"]
    ended = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "error: cannot write" in ended.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.array_record*"))


def test_real_photographs(tmp_path):
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"{PHOTOGRAPHS} is not here")
    manifest, _ = preparation.prepare(
        Settings(f"webdataset:{PHOTOGRAPHS}", shards=2),
        tmp_path / "out",
        options=["--direct_num_workers=2", "--direct_running_mode=multi_threading"],
    )
    written = open_source(f"array_record:{tmp_path}/out/*.array_record*")
    assert manifest["in"] == 1000 and manifest["out"] == len(written) >= 998
    assert all(len(written[index]["captions"]["captions"]) == 5 for index in (0, 500, 997))
