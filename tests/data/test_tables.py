"""Arrow, Hugging Face's folders and Parquet as sources, on real files."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmjax.data.records import Fields
from mmjax.data.sources.tables import ArrowSource, ParquetSource
from mmjax.errors import RecordError, UserError

FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "big dog"]}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table(start, count, **metadata):
    """Rows with an image as Hugging Face stores it, a text and a class; every fifth text is missing."""
    numbers = range(start, start + count)
    columns = {
        "image": [{"bytes": b"image %d" % number, "path": None} for number in numbers],
        "caption": [f"é {number}" if number % 5 else None for number in numbers],
        "label": pa.array([number % 3 - 1 for number in numbers], pa.int64()),
    }
    return pa.table(columns).replace_schema_metadata(metadata)


def write_arrow(path, rows, file_format=False, batch=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file:
        new = pa.ipc.new_file if file_format else pa.ipc.new_stream
        with new(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=batch)


def save_to_disk(folder, tables, features=FEATURES, **state):
    """What `Dataset.save_to_disk` of Hugging Face leaves."""
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, rows in zip(names, tables, strict=True):
        write_arrow(folder / name, rows)
    content = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (folder / "state.json").write_text(json.dumps(content | state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def assert_rows(source, start, count):
    assert len(source) == count
    for index, number in enumerate(range(start, start + count)):
        record = source[index]
        assert record["image"] == b"image %d" % number
        assert record["captions"] == ({"caption": [f"é {number}"]} if number % 5 else {})
        assert record["label"] == number % 3 - 1


def test_a_saved_data_set(tmp_path):
    folder = save_to_disk(tmp_path / "saved", [table(0, 20), table(20, 3)])
    source = ArrowSource(str(folder))
    assert_rows(source, 0, 23)
    assert source[22]["key"] == "data-00001-of-00002.arrow:2"
    named = ArrowSource(str(folder), fields=Fields(captions=("label_name", "caption")))
    assert named[1]["captions"] == {"label_name": ["cat"], "caption": ["é 1"]}
    assert named[2]["captions"] == {"label_name": ["big dog"], "caption": ["é 2"]}
    assert named[0]["captions"] == {}  # -1 is no class


def test_splits_of_a_dictionary(tmp_path):
    for split, start in ("train", 0), ("test", 50):
        save_to_disk(tmp_path / "saved" / split, [table(start, 4)])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert_rows(ArrowSource(str(tmp_path / "saved"), "test"), 50, 4)
    with pytest.raises(UserError, match='no split "valid"; known: train, test'):
        ArrowSource(str(tmp_path / "saved"), "valid")


@pytest.mark.parametrize("name", ["_indices_data_files", "_indices_files"])
def test_the_order_of_a_shuffled_data_set(tmp_path, name):
    folder = save_to_disk(tmp_path / "saved", [table(0, 20), table(20, 10)], **{name: [{"filename": "indices.arrow"}]})
    order = [29, 3, 3, 0, 21]
    write_arrow(folder / "indices.arrow", pa.table({"indices": pa.array(order, pa.uint64())}), batch=2)
    source = pickle.loads(pickle.dumps(ArrowSource(str(folder))))
    assert [record["image"] for record in source] == [b"image %d" % number for number in order]
    write_arrow(folder / "indices.arrow", pa.table({"indices": pa.array([30], pa.uint64())}))
    with pytest.raises(UserError, match="beyond the 30"):
        ArrowSource(str(folder))


@pytest.mark.parametrize("file_format", [False, True])
def test_arrow_files_in_both_formats(tmp_path, file_format):
    write_arrow(tmp_path / "a" / "0.arrow", table(0, 11), file_format)
    write_arrow(tmp_path / "b" / "0.arrow", table(11, 5), file_format)
    source = ArrowSource(str(tmp_path / "{a,b}" / "*.arrow"))
    assert_rows(source, 0, 16)
    assert [source[index]["key"] for index in (0, 11)] == ["a/0.arrow:0", "b/0.arrow:0"]
    with pytest.raises(IndexError):
        source[16]


def test_parquet_is_converted_once_and_read_from_any_thread(tmp_path, cache):
    features = json.dumps({"info": {"features": FEATURES}})
    for number in range(3):
        pq.write_table(table(10 * number, 10, huggingface=features), tmp_path / f"{number}.parquet", row_group_size=4)
    shown = []

    def progress(items, total, title):
        shown.append((total, title))
        return items

    source = ParquetSource(str(tmp_path), progress=progress)
    assert shown == [(3, "converting 3 parquet files")]
    with ThreadPoolExecutor(4) as pool:
        copy = pickle.loads(pickle.dumps(source))
        assert list(pool.map(copy.__getitem__, range(30))) == [source[index] for index in range(30)]
    assert_rows(copy, 0, 30)
    assert len(pickle.dumps(source)) < 3000  # the rows stay in the files
    assert ParquetSource(str(tmp_path), fields=Fields(captions=("label_name",)), progress=progress)[2]["captions"] == {
        "label_name": ["big dog"]
    }
    assert len(shown) == 1
    assert len(list((cache / "parquet").iterdir())) == 3

    before = source.fingerprint
    assert ParquetSource(str(tmp_path)).fingerprint == before
    assert ParquetSource(str(tmp_path), fields=Fields(image="image")).fingerprint != before
    pq.write_table(table(100, 40), tmp_path / "2.parquet")
    changed = ParquetSource(str(tmp_path), progress=progress)
    assert shown[1:] == [(1, "converting 1 parquet files")]
    assert (len(changed), changed.fingerprint != before) == (60, True)


def test_images_as_bytes_and_as_paths(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"a file")
    rows = [
        {"nested": {"photo": b"bytes"}, "img": {"bytes": None, "path": "images/a.jpg"}, "path": "images/a.jpg"},
        {"nested": {"photo": None}, "img": {"bytes": b"inside", "path": "images/a.jpg"}, "path": "../outside.jpg"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path.parent / "outside.jpg").write_bytes(b"secret")

    def read(index, image, root=""):
        return ParquetSource(str(tmp_path / "t.parquet"), "", Fields(image=image), root)[index]["image"]

    assert read(0, "nested.photo") == b"bytes"
    assert [read(index, "img") for index in (0, 1)] == [b"a file", b"inside"]
    assert read(0, "path") == b"a file"
    assert read(0, "path", root=str(tmp_path)) == b"a file"
    with pytest.raises(RecordError, match="leads out of"):
        read(1, "path")
    with pytest.raises(UserError, match='no column "photo"; it has: nested, img, path'):
        read(0, "photo")


def test_what_is_wrong_with_a_whole_data_set(tmp_path, cache):
    pq.write_table(table(0, 1000), tmp_path / "whole.parquet", row_group_size=100)
    content = (tmp_path / "whole.parquet").read_bytes()
    for damage in (content[:100], content[:-100], b"", content[:200] + bytes(2000) + content[2200:]):
        (tmp_path / "bad.parquet").write_bytes(damage)
        with pytest.raises(UserError, match=r"bad\.parquet.* damaged"):
            ParquetSource(str(tmp_path / "bad.parquet"))
    assert list((cache / "parquet").iterdir()) == []
    pq.write_table(pa.table({"text": ["other"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet has other columns than .*whole\.parquet"):
        ParquetSource(str(tmp_path / "{whole,x}.parquet"))
    pq.write_table(pa.table({"number": [1]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="no column with a usual name.*number"):
        ParquetSource(str(tmp_path / "y.parquet"))
    with pytest.raises(UserError, match="no data at"):
        ParquetSource(str(tmp_path / "z.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*state\.json.*pattern"):
        ArrowSource(str(tmp_path / "empty"))
    for state in ('{"_data_files": 3}', '{"_data_files": [{"filename": "../whole.parquet"}]}', "[]", "{", "{}"):
        (tmp_path / "empty" / "state.json").write_text(state)
        with pytest.raises(UserError, match=r"state\.json"):
            ArrowSource(str(tmp_path / "empty"))


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_data(tmp_path, monkeypatch):
    pq.write_table(table(0, 5), tmp_path / "a.parquet")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the data cache .*/file/parquet: .*set MMJAX_CACHE"):
        ParquetSource(str(tmp_path / "a.parquet"))


def test_the_files_of_a_split_in_a_folder(tmp_path):
    (tmp_path / "repository" / "data").mkdir(parents=True)
    for name, start, count in (("train-0", 0, 5), ("train-1", 5, 2), ("test-0", 100, 3)):
        pq.write_table(table(start, count), tmp_path / "repository" / "data" / f"{name}.parquet")
    folder = str(tmp_path / "repository")
    assert_rows(ParquetSource(folder, "train"), 0, 7)
    assert_rows(ParquetSource(f"{folder}/data", "test"), 100, 3)
    assert len(ParquetSource(folder)) == len(ParquetSource(folder, "other")) == 10
    with pytest.raises(UserError, match="no \\*.parquet in"):
        ParquetSource(str(tmp_path))
    with pytest.raises(UserError, match="written by save_to_disk: use arrow:"):
        ParquetSource(str(save_to_disk(tmp_path / "saved", [table(0, 5)])))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_bytes_give_record_or_user_errors_only(tmp_path, changes):
    write_arrow(tmp_path / "whole.arrow", table(0, 30))
    content = bytearray((tmp_path / "whole.arrow").read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    (tmp_path / "bad.arrow").write_bytes(content)
    try:
        source = ArrowSource(str(tmp_path / "bad.arrow"))
    except UserError:
        return
    for index in range(len(source)):
        try:
            assert set(source[index]) >= {"key", "captions", "label", "mirror"}
        except RecordError as error:
            assert f"bad.arrow:{index}" in str(error)


def test_more_files_than_a_process_may_open(tmp_path):
    write_arrow(tmp_path / "0.arrow", table(0, 3))
    for number in range(1, 300):
        os.link(tmp_path / "0.arrow", tmp_path / f"{number}.arrow")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "from mmjax.data.sources.tables import ArrowSource\n"
        "source = ArrowSource(sys.argv[1]); print(len(source), source[899]['image'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "*.arrow")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "900 b'image 2'"


@pytest.mark.parametrize("group_size", [50, 2000])
def test_memory_does_not_grow_with_a_parquet_file(tmp_path, group_size):
    rows = pa.table({"image": [os.urandom(100_000)] * 2000})  # 200 MB
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 32}  # small pages
    pq.write_table(rows, tmp_path / "big.parquet", row_group_size=group_size, **options)
    program = (
        "import sys\n"
        "from mmjax.data.sources.tables import ParquetSource\n"
        "source = ParquetSource(sys.argv[1])\n"
        "import pyarrow\n"
        "print(len(source), pyarrow.default_memory_pool().max_memory() // 2**20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "big.parquet")], capture_output=True, text=True, check=True
    )
    count, peak = map(int, done.stdout.split())
    assert count == 2000
    assert peak < 120
