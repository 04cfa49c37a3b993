"""CSV, JSON Lines and class folders as sources, on real files."""

import contextlib
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmjax.data.records import Fields
from mmjax.data.sources import lists
from mmjax.data.sources.folder import FolderSource
from mmjax.data.sources.lists import CsvSource, JsonLinesSource
from mmjax.data.sources.tables import ParquetSource
from mmjax.errors import RecordError, UserError

LIST_SOURCES = {"csv": CsvSource, "jsonl": JsonLinesSource, "parquet": ParquetSource}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path):
    """A folder with images a.jpg, b.jpg, ...; a file's content is its name."""
    folder = tmp_path / "data"
    folder.mkdir()
    for letter in "abcdef":
        (folder / f"{letter}.jpg").write_bytes(letter.encode())
    return folder


def write_list(kind, path, rows):
    """The same rows in any of the three formats."""
    if kind == "csv":
        quoted = [",".join('"{}"'.format(value.replace('"', '""')) for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *quoted]) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return LIST_SOURCES[kind]


@pytest.mark.parametrize("kind", LIST_SOURCES)
def test_a_list_names_images_by_path(images, kind):
    rows = [{"filepath": f"{letter}.jpg", "title": f'é "{letter}",\nsecond line', "n": "3"} for letter in "abc"]
    path = images / f"list.{kind}"
    source = pickle.loads(pickle.dumps(write_list(kind, path, rows)(str(path))))
    assert len(source) == 3
    assert [record["image"] for record in source] == [b"a", b"b", b"c"]
    assert source[1]["captions"] == {"title": ['é "b",\nsecond line']}
    assert len({record["key"] for record in source}) == 3
    labelled = LIST_SOURCES[kind](str(path), fields=Fields("filepath", ("n", "title"), "n"))
    assert (labelled[0]["label"], labelled[0]["captions"]["n"]) == (3, ["3"])
    assert labelled.fingerprint != source.fingerprint


@pytest.mark.parametrize("kind", LIST_SOURCES)
def test_the_fingerprint_follows_the_bytes_not_the_place(images, tmp_path, kind):
    make = write_list(kind, images / "list", [{"filepath": "a.jpg", "title": "x"}])
    (tmp_path / "other").mkdir()
    first = make(str(images / "list")).fingerprint
    (images / "list").rename(tmp_path / "other" / "list")
    assert make(str(tmp_path / "other" / "list")).fingerprint == first
    write_list(kind, tmp_path / "other" / "list", [{"filepath": "a.jpg", "title": "longer than before"}])
    assert make(str(tmp_path / "other" / "list")).fingerprint != first


@pytest.mark.parametrize("kind", LIST_SOURCES)
def test_hostile_paths_are_faults_of_their_records(images, tmp_path, kind):
    os.mkfifo(images / "pipe.jpg")
    (images / "zero.jpg").symlink_to("/dev/zero")
    (images / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    hostile = ["../../../../../../etc/passwd", "/etc/passwd", str(tmp_path / "secret.jpg"), "pipe.jpg", "zero.jpg"]
    hostile += ["out.jpg", ".", "missing.jpg", "x" * 300, "iVBOR" * 2000, "a.jpg/b.jpg", "a\0b"]
    rows = [{"filepath": path, "title": "x"} for path in [*hostile, "a.jpg"]]
    source = write_list(kind, images / "list", rows)(str(images / "list"))
    for index in range(len(hostile)):
        with pytest.raises(RecordError) as caught:
            source[index]
        assert len(str(caught.value)) < 1000
    assert source[len(hostile)]["image"] == b"a"
    wider = LIST_SOURCES[kind](str(images / "list"), root=str(tmp_path))
    assert wider[hostile.index(str(tmp_path / "secret.jpg"))]["image"] == b"secret"
    with pytest.raises(RecordError, match="leads out of"):
        wider[0]


def test_csv_details(images):
    path = images / "list.tsv"
    path.write_bytes(b"\xef\xbb\xbffilepath\ttitle\tlabel\r\na.jpg\tbad \xff byte\t1\r\n\r\nb.jpg\t\t2\r\n")
    source = CsvSource(str(path))
    assert len(source) == 2
    assert source[0]["captions"] == {"title": ["bad \ufffd byte"]}
    assert (source[1]["image"], source[1]["captions"], source[1]["label"]) == (b"b", {}, 2)
    with pytest.raises(UserError, match=r'list\.tsv has no column "text"; it has: filepath, title, label'):
        CsvSource(str(path), fields=Fields(captions=("text",)))

    (images / "one.csv").write_text("filepath,title\na.jpg,x\nb.jpg,y,z\n")
    with pytest.raises(UserError, match=r"one\.csv.*Row #3: Expected 2 columns, got 3"):
        CsvSource(str(images / "one.csv"))
    (images / "two.csv").write_text("a.jpg,a cat\nb.jpg,a dog\n")
    with pytest.raises(UserError, match=r"two\.csv has no column with a usual name.*: a\.jpg, a cat"):
        CsvSource(str(images / "two.csv"))
    (images / "three.csv").write_text("title,title\nx,y\n")
    with pytest.raises(UserError, match="twice"):
        CsvSource(str(images / "three.csv"))
    for content in ("", "\n\n"):
        (images / "empty.csv").write_text(content)
        with pytest.raises(UserError, match=r"empty\.csv"):
            CsvSource(str(images / "empty.csv"))


def test_json_lines_details(images, monkeypatch):
    lines = ["\ufeff" + '{"image": "a.jpg", "meta": {"alt": ["x", "y"]}}', "", " \t\r", '{"image": "b.jpg"}\r', "[1]"]
    lines += ["{", "[" * 100_000, '{"n": ' + "9" * 10_000 + "}", '{"image": 3}', '{"image": {"path": "c.jpg"}}']
    (images / "1.jsonl").write_text("\n".join(lines))
    (images / "2.jsonl").write_text('{"image": "d.jpg"}\n')
    monkeypatch.setattr(lists, "_CHUNK_BYTES", 7)  # lines go over the ends of chunks
    source = JsonLinesSource(str(images / "*.jsonl"))
    assert len(source) == 9
    assert [source[index]["image"] for index in (0, 1, 7, 8)] == [b"a", b"b", b"c", b"d"]
    for index, line in (2, 5), (3, 6), (4, 7), (5, 8), (6, 9):
        with pytest.raises(RecordError, match=rf"1\.jsonl:{line}"):
            source[index]
    nested = JsonLinesSource(str(images / "1.jsonl"), fields=Fields("image", ("meta.alt",)))
    assert nested[0]["captions"] == {"meta.alt": ["x", "y"]}
    with pytest.raises(RecordError, match=r'1\.jsonl:4\' has no field "meta.alt"'):
        nested[1]
    monkeypatch.setattr(lists, "MAX_LINE_BYTES", 30)
    with pytest.raises(RecordError, match=r"1\.jsonl:1': the line has 50 bytes, more than 30"):
        source[0]
    (images / "2.jsonl").unlink()
    with pytest.raises(RecordError, match=r"2\.jsonl:1': cannot read"):
        source[8]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([b"a", b"\n", b" ", b"\r", b"{}", b"\xff"]), max_size=30).map(b"".join), st.integers(1, 9)
)
def test_lines_are_found_as_python_finds_them(tmp_path, content, chunk):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "_CHUNK_BYTES", chunk)
        found, _ = lists._find_lines(str(tmp_path / "x.jsonl"))
    expected = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [(number, content[start:end]) for start, end, number in found.tolist()] == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a.jpg"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(["image", "path", "captions", "txt", "label", "cls", "mirror"]), JSON)


def assert_faults_are_of_records(source):
    for index in range(len(source)):
        with contextlib.suppress(RecordError):
            assert set(source[index]) >= {"key", "captions", "label", "mirror"}


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OBJECTS.map(json.dumps).map(str.encode) | st.binary(max_size=40), max_size=6))
def test_any_lines_of_json_give_records_or_record_errors(images, lines):
    (images / "fuzz.jsonl").write_bytes(b"\n".join(lines))
    assert_faults_are_of_records(JsonLinesSource(str(images / "fuzz.jsonl")))
    mapped = Fields("image.path", ("captions", "txt"), "label")
    assert_faults_are_of_records(JsonLinesSource(str(images / "fuzz.jsonl"), fields=mapped))


@pytest.mark.parametrize("value", ["Infinity", "1e999", '"x"', "[]", '{"a": 1}'])
def test_labels_that_are_none(images, value):
    (images / "list.jsonl").write_text(f'{{"image": "a.jpg", "label": {value}}}')
    assert JsonLinesSource(str(images / "list.jsonl"))[0]["label"] == -1
    with pytest.raises(RecordError, match="whole number"):
        JsonLinesSource(str(images / "list.jsonl"), fields=Fields(label="label"))[0]


@pytest.mark.parametrize("value", ["NaN", "null"])
def test_a_missing_label_is_no_fault(images, value):
    (images / "list.jsonl").write_text(f'{{"image": "a.jpg", "label": {value}}}')
    for fields in (Fields(), Fields(label="label")):
        assert JsonLinesSource(str(images / "list.jsonl"), fields=fields)[0]["label"] == -1


def test_a_csv_file_with_tabs(images):
    (images / "list.csv").write_text("filepath\ttitle\na.jpg\ta cat, sleeping\n")
    assert CsvSource(str(images / "list.csv"))[0]["captions"] == {"title": ["a cat, sleeping"]}
    (images / "other.csv").write_text("filepath,the\ttitle\na.jpg,a cat\n")
    assert CsvSource(str(images / "other.csv"), fields=Fields(captions=("the\ttitle",)))[0]["captions"]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=30) | st.lists(st.sampled_from([b"a.jpg", b",", b'"', b"\n", b"\0", b"\xff"])).map(b"".join))
def test_any_csv_gives_records_or_errors_for_users(images, content):
    (images / "fuzz.csv").write_bytes(b"filepath,title,label\n" + content)
    try:
        source = CsvSource(str(images / "fuzz.csv"))
    except UserError:
        return
    assert_faults_are_of_records(source)


def make_folder(tmp_path):
    folder = tmp_path / "classes"
    for name in ("big_dog/deep/1.JPG", "big_dog/0.png", "cat-tail/2.webp", "cat-tail/3.jpg", "top.jpg", ".git/4.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "ant").mkdir()  # an empty class counts
    (folder / "cat-tail" / "3.txt").write_text("first\n\nsecond é\n")
    (folder / "cat-tail" / "._3.jpg").write_bytes(b"what macOS leaves")
    (folder / "linked").symlink_to(folder / "cat-tail", target_is_directory=True)
    return folder


def test_a_folder_of_classes(tmp_path):
    folder = make_folder(tmp_path)
    source = pickle.loads(pickle.dumps(FolderSource(str(folder))))
    found = [(record["key"], record["label"], record["captions"]) for record in source]
    assert found == [
        ("top.jpg", -1, {}),
        ("big_dog/0.png", 1, {"class": ["big dog"]}),
        ("big_dog/deep/1.JPG", 1, {"class": ["big dog"]}),
        ("cat-tail/2.webp", 2, {"class": ["cat tail"]}),
        ("cat-tail/3.jpg", 2, {"txt": ["first", "second é"]}),
    ]
    assert all(record["image"] == record["key"].encode() for record in source)
    both = FolderSource(str(folder), fields=Fields(captions=("class", "txt")))
    assert [both[index]["captions"] for index in (0, 4)] == [{}, {"class": ["cat tail"], "txt": ["first", "second é"]}]

    before = source.fingerprint
    assert FolderSource(str(folder)).fingerprint == before
    (folder / "cat-tail" / "3.jpg").write_bytes(b"another size")
    assert FolderSource(str(folder)).fingerprint != before


def test_faults_in_folders(tmp_path):
    folder = make_folder(tmp_path)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "ant" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(folder / "ant" / "pipe.jpg")
    source = FolderSource(str(folder))
    assert len(source) == 6
    with pytest.raises(RecordError, match="leads out of"):
        source[1]
    assert FolderSource(str(folder), root=str(tmp_path))[1]["image"] == b"secret"
    (folder / "top.jpg").unlink()
    with pytest.raises(RecordError, match="No such file"):
        source[0]
    with pytest.raises(UserError, match='no column "caption"; it has: image, label, class, txt'):
        FolderSource(str(folder), fields=Fields(captions=("caption",)))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        FolderSource(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"cannot read .*missing"):
        FolderSource(str(Path(tmp_path / "missing")))
