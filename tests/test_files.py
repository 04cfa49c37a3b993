import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmjax import files
from mmjax.errors import RecordError, UserError


def test_patterns_expand_as_in_a_shell(tmp_path):
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b.tar", "c.tar"):
        (tmp_path / name).write_text(name)

    def names(pattern):
        return [os.path.basename(path) for path in files.expand("::".join(f"{tmp_path}/{p}" for p in pattern))]

    assert names(["a-{008..010}.tar"]) == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert names(["{c,b}.tar"]) == ["c.tar", "b.tar"]
    assert names(["a-{010..008}.tar"]) == ["a-010.tar", "a-009.tar", "a-008.tar"]
    (tmp_path / "odd[1].tar").write_text("")
    assert names(["odd[1].tar"]) == ["odd[1].tar"]
    assert names(["?.tar", "a-*.tar"]) == ["b.tar", "c.tar", "a-008.tar", "a-009.tar", "a-010.tar"]
    with pytest.raises(UserError, match=r"no data at '.*a-011.tar': no such file"):
        names(["a-{008..011}.tar"])
    with pytest.raises(UserError, match="more than 10,000,000 files"):
        files.expand("{0..99999999999}.tar")


def test_remote_files_are_copied_into_the_cache_once(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for name in ("one.tar", "two.tar"):
        memory.pipe(f"/shards/{name}", name.encode())
    copies = files.expand("memory://shards/*.tar")
    assert [Path(path).read_bytes() for path in copies] == [b"one.tar", b"two.tar"]
    assert files.expand("memory://shards/two.tar") == copies[1:]
    assert not list(tmp_path.rglob(".*"))  # nothing half copied
    with pytest.raises(UserError, match="no data at 'memory://shards/three.tar'"):
        files.expand("memory://shards/three.tar")
    with pytest.raises(UserError, match="cannot read 'nowhere://shards'"):
        files.expand("nowhere://shards")


def test_only_regular_files_inside_the_root_are_read(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    (root / "below" / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inner").symlink_to(root / "below" / "file")
    (root / "zero").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe")
    for name in ("below/file", "./below/../below/file", str(root / "below" / "file"), "inner"):
        assert files.read_inside(str(root), name) == b"inside"
    for name in ("../secret", str(tmp_path / "secret"), "link", "zero", "/etc/passwd"):
        with pytest.raises(RecordError, match="leads out of"):
            files.read_inside(str(root), name)
    for name, message in (("pipe", "no regular file"), ("below", "no regular file"), ("none", "No such file")):
        with pytest.raises(RecordError, match=message):
            files.read_inside(str(root), name)
    with pytest.raises(RecordError, match="is no path"):
        files.read_inside(str(root), "a\0b")
    assert files.read_inside("/", str(tmp_path / "secret")) == b"outside"
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 5)
    with pytest.raises(RecordError, match="has 6 bytes, more than 5"):
        files.read_inside(str(root), "below/file")


def test_many_writers_of_one_file_at_once(tmp_path):
    def write(number):
        files.write_atomically(tmp_path / "file", bytes([number]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert len(set((tmp_path / "file").read_bytes())) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the data cache .*/file/x: .*; set MMJAX_CACHE"):
        files.cache_folder("x")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        files.write_atomically(path, None)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
