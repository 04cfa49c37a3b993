import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import files
from mmjax.data.records import Fields
from mmjax.data.sources import tar_index, webdataset
from mmjax.data.sources.webdataset import WebDatasetSource
from mmjax.errors import RecordError, UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_tar(path, members, tar_format=tarfile.PAX_FORMAT):
    """Members are (name, content), or TarInfo for anything but a regular file."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))
    return path


def header(name=b"0.jpg", size=b"00000000000\0", kind=b"0", rest=b"ustar\x0000"):
    """One header block with a right checksum."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, size, kind
    block[257 : 257 + len(rest)] = rest
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(kind, content, size=None):
    """A pax header or a GNU long name."""
    padding = b"\0" * (-len(content) % 512)
    return header(b"extended", b"%011o\0" % (len(content) if size is None else size), kind) + content + padding


def pax_record(keyword, value):
    length = len(keyword) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, keyword, value)


def groups(path):
    """The records as the standard library's tarfile sees them: [(key, {extension: bytes})]."""
    found = []
    with tarfile.open(path) as tar:
        for entry in tar:
            key, _, extension = entry.name.partition(".")
            if not found or found[-1][0] != key:
                found.append((key, {}))
            found[-1][1][extension] = tar.extractfile(entry).read()
    return found


@pytest.mark.parametrize(("name", "image"), [("flickr8k_dev", "jpg"), ("tux_stamps", "webp")])
def test_real_shards_read_as_tarfile_reads_them(name, image):
    path = SHARED / f"{name}.tar"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    source, expected = WebDatasetSource(str(path)), groups(path)
    assert len(source) == len(expected)
    for record, (key, members) in zip(source, expected, strict=True):
        captions = json.loads(members["json"])["captions"]
        captions = captions if isinstance(captions, dict) else {"captions": captions}
        assert record["key"] == key and record["image"] == members[image]
        assert set(record["captions"]) <= set(captions) and record["captions"]
        for group, texts in record["captions"].items():
            wanted = [captions[group]] if isinstance(captions[group], str) else captions[group]
            assert texts == [text.strip() for text in wanted if text.strip()]


NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=90),
    st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"x").decode("utf-8", "surrogateescape")),
    st.lists(st.text("abé漢.", min_size=1, max_size=60), min_size=1, max_size=6).map("/".join),
).filter(lambda name: not name.endswith("/"))
KINDS = st.sampled_from([b"0", b"0", b"0", b"\0", b"7", b"1", b"2", b"3", b"5", b"6"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(NAMES, KINDS, st.sampled_from([0, 1, 511, 512, 513, 5000])), max_size=8), st.data())
def test_the_reader_finds_what_tarfile_finds(members, data):
    tar_format = FORMATS[data.draw(st.sampled_from(list(FORMATS)))]
    globally = {"comment": "é", "path": "everywhere"} if data.draw(st.booleans()) else {"comment": "x"}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.tar"
        with tarfile.open(path, "w", format=tar_format, pax_headers=globally) as tar:
            for name, kind, size in [("first", b"0", 1), *members]:  # tarfile refuses an archive of none
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, name[::-1] if kind in b"12" else ""
                entry.size = size  # of a directory or link too: it says nothing about what follows
                with contextlib.suppress(ValueError):  # too long for ustar
                    tar.addfile(entry, io.BytesIO(b"\xff" * size) if entry.isreg() else None)
        with tarfile.open(path) as tar:
            regular = [entry for entry in tar if entry.isreg()]
        expected = [(e.name.encode("utf-8", "surrogateescape"), e.offset_data, e.size) for e in regular]
        assert list(tar_index.read_members(path)) == expected


@pytest.mark.parametrize(
    "options", [["--format=gnu"], *(["--format=pax", f"--sparse-version={v}"] for v in (0.0, 1.0))]
)
def test_sparse_files_are_passed_over(tmp_path, options):
    if (
        not shutil.which("tar")
        or "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("there is no GNU tar")
    with open(tmp_path / "a.jpg", "wb") as file:
        for block in range(60):  # so many pieces that the map goes on behind the header
            file.seek(block * 2**17)
            file.write(b"x" * 4096)
    (tmp_path / "b.jpg").write_bytes(b"dense")
    subprocess.run(["tar", "-S", *options, "-cf", "x.tar", "a.jpg", "b.jpg"], cwd=tmp_path, check=True)
    if (tmp_path / "x.tar").stat().st_size > 2**20:
        pytest.skip("this file system has no holes")
    (record,) = WebDatasetSource(f"{tmp_path}/x.tar")
    assert record["key"] == "b" and record["image"] == b"dense"


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_members_of_many_gigabytes_are_only_read_where_needed(tmp_path, tar_format):
    path, size = tmp_path / "x.tar", 9 * 2**30
    with open(path, "wb") as file:
        big, after = tarfile.TarInfo("a.npy"), tarfile.TarInfo("a.jpg")
        big.size, after.size = size, 3
        file.write(big.tobuf(FORMATS[tar_format]))
        file.seek(size, os.SEEK_CUR)
        file.write(after.tobuf(FORMATS[tar_format]) + b"jpg".ljust(512, b"\0"))
    (record,) = WebDatasetSource(str(path))
    assert record["image"] == b"jpg"
    with pytest.raises(RecordError, match=r"'a'.*'npy' has 9,663,676,416 bytes"):
        WebDatasetSource(str(path), fields=Fields(image="npy"))[0]


def test_members_become_records(tmp_path):
    link = tarfile.TarInfo("f/01.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("f/01.JPG", b"one"),
            ("f/README", b""),
            ("f/.hidden.jpg", b"no"),
            link,
            ("f/01.Seg.PNG", b"mask"),
            ("f/01.txt", b" a caption\n"),
            ("f/01.cls", b"7\n"),
            ("g/01.jpg", b"another folder"),
            ("../../up.jpg", b"up"),
            ("/abs.jpg", b"absolute"),
            ("again.jpg", b"old"),
            ("again.jpg", b"new"),
            ("f/01.jpg", b"not next to its own kind"),
            ("\udcff\udcfe.jpg", b"no UTF-8"),
        ],
    )
    source = WebDatasetSource(str(path))
    keys = ["f/01", "g/01", "../../up", "/abs", "again", "f/01", "\udcff\udcfe"]
    images = [b"one", b"another folder", b"up", b"absolute", b"new", b"not next to its own kind", b"no UTF-8"]
    assert [record["key"] for record in source] == keys and [record["image"] for record in source] == images
    assert source[0]["captions"] == {"txt": ["a caption"]} and source[0]["label"] == 7
    assert source[-1] == source[6]
    with pytest.raises(IndexError):
        source[7]
    assert WebDatasetSource(str(path), fields=Fields(image="seg.png"))[0]["image"] == b"mask"
    with pytest.raises(RecordError, match="g/01"):
        WebDatasetSource(str(path), fields=Fields(image="seg.png"))[1]


def test_json_holds_fields_too(tmp_path):
    content = {"caption": "inside", "txt": "hidden", "label": 3, "image": "http://x/a.jpg", "meta": {"alt": "deep"}}
    members = [("a.jpg", b"jpg"), ("a.json", json.dumps(content).encode()), ("a.txt", b"outside"), ("a.en.txt", b"own")]
    path = str(write_tar(tmp_path / "x.tar", members))

    def captions(*names):
        return WebDatasetSource(path, fields=Fields(captions=names))[0]["captions"]

    (record,) = WebDatasetSource(path)
    assert record["captions"] == {"caption": ["inside"]} and record["label"] == 3 and record["image"] == b"jpg"
    assert captions("txt", "json.txt") == {"txt": ["outside"], "json.txt": ["hidden"]}
    assert captions("meta.alt", "en.txt") == {"meta.alt": ["deep"], "en.txt": ["own"]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\xfd",
        b'{"label": ' + b"9" * 5000 + b"}",
        b'{"a":' * 200_000,
        b"[" * 200_000,
        b'{"a": "' + b"x" * 2**24 + b'"}',
        b'{"caption": {"en": 3}}',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_broken_json_is_a_fault_of_its_record(tmp_path, content):
    members = [("a.jpg", b""), ("a.json", content), ("b.jpg", b"b"), ("b.json", b'{"caption": "fine"}')]
    source = WebDatasetSource(str(write_tar(tmp_path / "x.tar", members)))
    with pytest.raises(RecordError, match="record '?a"):
        source[0]
    assert source[1]["captions"] == {"caption": ["fine"]}


def test_a_text_of_many_megabytes_is_refused(tmp_path):
    source = WebDatasetSource(str(write_tar(tmp_path / "x.tar", [("a.txt", b"x" * (2**24 + 1))])))
    with pytest.raises(RecordError, match="16,777,217 bytes"):
        source[0]


WHOLE = header() + bytes(1024)
HOSTILE = {
    "empty file": (b"", "empty"),
    "no record": (bytes(10240), "no record"),
    "text": (b"this is no tar file" * 100, "is no tar file, or is damaged"),
    "damaged later": (header() + WHOLE.replace(b"0.jpg", b"1.jpg"), "wrong checksum at byte 512"),
    "half a header": (header() + header()[:200], "cut short at byte 512"),
    "half a member": (header(size=b"00000001000\0") + b"x" * 511, "ends inside the member at byte 0"),
    "beyond the end": (header(size=b"77777777777\0") + bytes(1024), "ends inside the member at byte 0"),
    "far beyond": (header(size=b"\x80" + b"\xff" * 11) + bytes(1024), "ends inside the member at byte 0"),
    "negative": (header(size=b"\xff" * 12) + bytes(1024), "negative size at byte 0"),
    "minus": (header(size=b"-0000000777\0") + bytes(1024), "negative size at byte 0"),
    "no digits": (header(size=b"hello world\0") + bytes(1024), "number is none"),
    "endless name": (extended(b"L", b"x", 2**40) + WHOLE, "over 1,048,576 bytes"),
    "endless pax": (extended(b"x", b"x", 2**30) + WHOLE, "over 1,048,576 bytes"),
    "name at the end": (extended(b"L", b"x" * 2000)[:1200], "ends inside"),
    "pax without length": (extended(b"x", b"path=x\n") + WHOLE, "malformed pax"),
    "pax too long": (extended(b"x", b"99 path=x\n") + WHOLE, "malformed pax"),
    "pax too short": (extended(b"x", b"3 path=x\n") + WHOLE, "malformed pax"),
    "pax of zero": (extended(b"x", b"0 path=x\n") + WHOLE, "malformed pax"),
    "pax size": (extended(b"x", pax_record(b"size", b"-5")) + WHOLE, "size is no number"),
    "pax big size": (extended(b"x", pax_record(b"size", b"9" * 5000)) + WHOLE, "size is no number"),
    "pax beyond": (extended(b"x", pax_record(b"size", b"9" * 15)) + WHOLE, "ends inside"),
    "sparse map": (header(kind=b"S")[:482] + b"\1" + bytes(29), "wrong checksum"),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "compressed.*decompress"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed.*decompress"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_shard_is_named(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        WebDatasetSource(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_chains_of_headers_end(tmp_path):
    """Where tarfile calls itself for each."""
    chain = extended(b"x", pax_record(b"path", b"a.jpg")) * 3000 + extended(b"L", b"b.jpg\0") * 3000 + header(b"c.jpg")
    (tmp_path / "x.tar").write_bytes(chain)
    assert [record["key"] for record in WebDatasetSource(f"{tmp_path}/x.tar")] == ["b"]


def test_times_in_a_gnu_header_are_no_part_of_the_name(tmp_path):
    (tmp_path / "x.tar").write_bytes(header(rest=b"ustar  \0".ljust(88, b"\0") + b"14000000000\0") + bytes(1024))
    assert [record["key"] for record in WebDatasetSource(f"{tmp_path}/x.tar")] == ["0"]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe.tar", "folder.tar"):
        with pytest.raises(UserError, match=name):
            WebDatasetSource(f"{tmp_path}/{name}")
    with pytest.raises(UserError, match="no data at"):
        WebDatasetSource(f"{tmp_path}/none-{{0..3}}.tar")


def test_a_shard_cut_anywhere_is_an_error_or_complete_up_to_the_cut(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.jpg", b"x" * 700 * i) for i in range(3)]).read_bytes()
    expected = [record["image"] for record in WebDatasetSource(f"{tmp_path}/whole.tar")]
    boundaries = {512: 1, 512 + 1536: 2, 512 + 1536 + 2048: 3}  # where headers or the end blocks start
    for cut in range(0, 4096 + 1500, 16):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(whole[:cut])
        complete = boundaries.get(cut, 3 if cut >= 4096 else 0)
        if complete:
            assert [record["image"] for record in WebDatasetSource(str(path))] == expected[:complete]
        else:
            with pytest.raises(UserError, match=f"{cut}.tar"):
                WebDatasetSource(str(path))


SMALL = io.BytesIO()
with tarfile.open(fileobj=SMALL, mode="w", format=tarfile.PAX_FORMAT) as _tar:
    for _name, _content in [
        ("a.jpg", b"j" * 600),
        ("a.json", b'{"captions": {"en": ["x"]}, "label": 3}'),
        ("é" * 60 + ".jpg", b"k"),
        ("é" * 60 + ".cls", b"5"),
    ]:
        _entry = tarfile.TarInfo(_name)
        _entry.size = len(_content)
        _tar.addfile(_entry, io.BytesIO(_content))
SMALL = SMALL.getvalue()[:9216]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=6),
    st.one_of(st.just(len(SMALL)), st.integers(0, len(SMALL))),
    st.booleans(),
)
def test_mutated_shards_raise_nothing_else(changes, cut, repair):
    content = bytearray(SMALL)
    for place, value in changes:
        content[place] = value
    for start in range(0, len(content), 512) if repair else ():  # so that the fault is found behind the checksum
        block = content[start : start + 512]
        if block[257:262] == b"ustar":
            content[start + 148 : start + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.tar").write_bytes(content[:cut])
        try:
            source = WebDatasetSource(f"{folder}/x.tar")
        except UserError:
            return
        for index in range(len(source)):
            with contextlib.suppress(RecordError):
                source[index]


@pytest.fixture
def shards(tmp_path):
    """50 shards of 200 members: 100 records of an image and a text."""
    for shard in range(50):
        keys = [f"{shard:05d}{i:04d}" for i in range(100)]
        members = [(f"{key}.{kind}", f"{kind} {key}".encode()) for key in keys for kind in ("jpg", "txt")]
        write_tar(tmp_path / f"{shard:05d}.tar", members, tarfile.USTAR_FORMAT)
    return tmp_path


def test_a_thousand_shards_are_promised_and_fifty_keep_it(shards, monkeypatch):
    """1,000 x 1,000 members in under 200 MB and 5 s: the index is small, and opening it again reads no shard."""
    monkeypatch.setenv("MMJAX_CACHE", str(shards / "cache"))
    shown = []
    source = WebDatasetSource(
        f"{shards}/{{00000..00049}}.tar", progress=lambda *seen: shown.append(seen[1:]) or seen[0]
    )
    assert len(source) == 5000 and shown == [(50, "indexing tar shards")]
    assert len(pickle.dumps(source)) < 50 * 10_000  # bytes a member
    (cached,) = (shards / "cache" / "tar-index").iterdir()
    assert cached.stat().st_size < 50 * 10_000

    first = source[0]
    for path in shards.glob("*.tar"):  # other bytes, yet nothing to tell from outside
        status = path.stat()
        path.write_bytes(b"\1" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = WebDatasetSource(f"{shards}/*.tar", progress=lambda *seen: pytest.fail("indexed again"))
    assert len(again) == 5000 and again[0]["key"] == first["key"]
    os.utime(shards / "00007.tar", ns=(0, 0))
    with pytest.raises(UserError, match="is no tar file"):
        WebDatasetSource(f"{shards}/*.tar")


def test_threads_and_pickled_copies_read_the_same(shards):
    source = WebDatasetSource(f"{shards}/*.tar")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint
    indices = [index * 1337 % 5000 for index in range(5000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(copy.__getitem__, indices))
    for index, record in zip(indices, found, strict=True):
        key = f"{index // 100:05d}{index % 100:04d}"
        assert record["key"] == key and record["image"] == f"jpg {key}".encode()
        assert record["captions"] == {"txt": [f"txt {key}"]}


def test_more_shards_than_files_may_be_open(shards):
    source = WebDatasetSource(f"{shards}/*.tar")
    webdataset._opened.cache_clear()  # a full one would close a file for each that it opens
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/dev/fd")}
    free = [number for number in range(1000) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))
    try:
        assert Counter(source[index]["key"][:5] for index in range(0, 5000, 50)) == {f"{i:05d}": 2 for i in range(50)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_damaged_or_unwritable_cache_is_done_without(tmp_path, monkeypatch):
    path = str(write_tar(tmp_path / "x.tar", [("a.jpg", b"a"), ("b.jpg", b"b")]))
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))
    expected = list(WebDatasetSource(path))
    (cached,) = (tmp_path / "cache" / "tar-index").iterdir()
    good = cached.read_bytes()
    for bad in (b"", b"PK\3\4 nonsense", good[: len(good) // 2], good.replace(b"ab", b"xy", 1)):
        assert bad != good
        cached.write_bytes(bad)
        assert list(WebDatasetSource(path)) == expected
        assert cached.read_bytes() == good
    monkeypatch.setenv("MMJAX_CACHE", path + "/below-a-file")
    assert list(WebDatasetSource(path)) == expected


def test_a_rewritten_shard_is_read_anew(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"old")])
    assert WebDatasetSource(str(path))[0]["image"] == b"old"
    path.unlink()
    write_tar(path, [("zero.jpg", b""), ("a.jpg", b"fresh")])
    assert WebDatasetSource(str(path))[1]["image"] == b"fresh"


def test_a_shard_that_shrinks_or_goes_is_a_fault_of_the_record(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a" * 100), ("b.jpg", b"b" * 100)])
    source = WebDatasetSource(str(path))
    os.truncate(path, 512 + 512 + 512 + 99)
    assert source[0]["image"] == b"a" * 100
    with pytest.raises(RecordError, match="'b'.*cut short"):
        source[1]
    gone = write_tar(tmp_path / "gone.tar", [("c.jpg", b"c")])
    source = WebDatasetSource(str(gone))
    gone.unlink()
    with pytest.raises(RecordError, match=r"'c'.*No such file"):
        source[0]


def test_the_fingerprint_is_of_names_sizes_and_fields(tmp_path):
    one = write_tar(tmp_path / "x.tar", [("a.jpg", b"a")])
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copyfile(one, tmp_path / "elsewhere" / "x.tar")
    os.utime(copy, ns=(1, 1))
    fingerprint = WebDatasetSource(str(one)).fingerprint
    assert WebDatasetSource(str(copy)).fingerprint == fingerprint
    assert WebDatasetSource(str(one), fields=Fields(image="jpg")).fingerprint != fingerprint
    assert WebDatasetSource(f"{one}::{copy}").fingerprint != fingerprint
    assert len(WebDatasetSource(f"{one}::{copy}")) == 2
    assert files.cache_root().joinpath("tar-index").is_dir()
