"""Where pretrained files come from."""

import hashlib
import os
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.interop import checksums, store
from tests.interop import fake_hub

VALUES = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}


def weights(folder, values=VALUES, **options):
    """The bytes of a file of weights."""
    path = folder / "made.safetensors"
    store.save_tensors(path, values, **options)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path):
    """A model on the hub, with what is not wanted of it."""
    return {
        "config.json": b'{"model_type": "clip"}',
        "tokenizer.model": b"pieces",
        "1_Pooling/config.json": b"{}",
        "model.safetensors": weights(tmp_path),
        "open_clip_model.safetensors": b"the same again",
        "pytorch_model.bin": b"the same again",
        "onnx/model.safetensors": b"not ours",
        "README.md": b"words",
    }


@pytest.fixture
def hub_cache(tmp_path):
    with fake_hub.cache_at(tmp_path / "hub", offline=True):
        yield tmp_path / "hub"


def wanted(files):
    return {n: files[n] for n in ("config.json", "tokenizer.model", "1_Pooling/config.json", "model.safetensors")}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_values(folder):
    tensors = store.open_tensors(folder)
    assert sorted(tensors.names()) == sorted(VALUES)
    for name, value in VALUES.items():
        np.testing.assert_array_equal(tensors.get(name), value)


def test_a_local_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    store.save_tensors(folder / "model.safetensors", VALUES)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "list.json").write_text("[1]")
    (folder / "broken.json").write_bytes(b'{"a": "\xff')
    (folder / "deep.json").write_text("[" * 100_000)
    found = store.find(folder)
    assert found.name == str(folder) and found.path == folder
    assert found.has("config.json") and not found.has("other.json") and not found.has(".")
    assert found.read_json("config.json") == {"a": 1}
    assert found.read_json("other.json", optional=True) == {}
    assert_values(found)
    for name, message in {
        "other.json": "has no other.json",
        "list.json": "list.json is damaged: it holds no JSON object",
        "broken.json": "broken.json is damaged",
        "deep.json": "deep.json is damaged",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            found.read_json(name)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="broken.json is damaged"):
        found.read_json("broken.json", optional=True)


def test_a_folder_of_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert store.find("~/model").path == tmp_path / "model"


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("nowhere", None, "nowhere is not there"),
        ("one/two/three", None, "one/two/three is not there"),
        ("a\0b/c", None, "is not there"),
        ("x" * 5000, None, "is not there"),
        ("file.txt", None, "file.txt is no folder"),
        ("folder", "v1", "folder cannot be of the revision 'v1': it is no name on the hub"),
        ("memory://folder", "v1", "cannot be of the revision 'v1': it is no name on the hub"),
        ("owner/model@v1", "v2", "cannot be of the revision 'v2': it names 'v1' itself"),
    ],
)
def test_a_source_that_is_none(tmp_path, monkeypatch, source, revision, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match=message):
        store.find(source, revision)


def test_a_path_is_never_a_name_on_the_hub(tmp_path, hub_cache, files, monkeypatch):
    fake_hub.fill(hub_cache, files)
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    with pytest.raises(UserError, match="owner/model is not there"):
        store.find(Path("owner/model"))
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert store.find("owner/model").path == Path("owner/model")  # a folder comes before a name on the hub


def test_which_file_weights_are_read_from(tmp_path):
    folder = store.Folder(tmp_path, "here")
    with pytest.raises(UserError, match="here has no weights: none of model.safetensors"):
        store.open_tensors(folder)
    names = ["one.safetensors", "open_clip_model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors"]
    for value, name in enumerate(names):
        if name.startswith("model-"):
            pairs = {"first": np.full(2, value), "second": np.full(2, value)}
            store.save_tensors(tmp_path / "model.safetensors", pairs, max_shard_bytes=16)
            assert (tmp_path / name).exists()
        else:
            (tmp_path / name).write_bytes(weights(tmp_path, {"first": np.full(2, value)}))
        assert store.open_tensors(folder).get("first").tolist() == [value, value]
    for name in ("open_clip_model.safetensors", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="several files of weights and no index: model-00001-of-00002.safetensors, "):
        store.open_tensors(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "epoch_32.pt"])
def test_pickles_are_refused(tmp_path, name):
    folder = store.Folder(tmp_path, "here")
    for other in (name, "training_args.bin", "optimizer.pt"):
        (tmp_path / other).write_bytes(b"anything")
    with pytest.raises(UserError, match=f"here has its weights only as a pickle, {name}.*can run code.*--allow_pickle"):
        store.open_tensors(folder)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="here has no weights"):
        store.open_tensors(folder, allow_pickle=True)


def test_pickles_in_parts_or_of_unclear_choice_are_refused(tmp_path):
    folder = store.Folder(tmp_path, "here")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match="only as a pickle, pytorch_model-00001-of-00002.bin"):
        store.open_tensors(folder)
    with pytest.raises(UserError, match="pickles in several files"):
        store.open_tensors(folder, allow_pickle=True)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match="several pickles: a.pt, b.pt"):
        store.open_tensors(folder, allow_pickle=True)


def test_a_pickle_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match="here: pytorch_model.bin is a pickle, which only torch reads, and it is not"):
        store.open_tensors(store.Folder(tmp_path, "here"), allow_pickle=True)


def test_a_model_is_downloaded_once(tmp_path, files):
    with fake_hub.hub(files, tmp_path / "hub") as server:
        found = store.find("owner/model")
        assert contents(found.path) == wanted(files)
        assert found.name == "owner/model" and found.path.name == fake_hub.COMMITS["main"]
        assert_values(found)
        server.asked.clear()
        assert store.find("owner/model@main").path == found.path
        assert not [path for method, path in server.asked if method == "GET" and "/resolve/" in path]
        pinned = store.find("owner/model", revision="v1")
        assert pinned.path.name == fake_hub.COMMITS["v1"] and contents(pinned.path) == wanted(files)
        assert store.find(f"owner/model@{fake_hub.COMMITS['v1']}").path == pinned.path
    for offline in (True, False):  # the second: nobody listens there any more
        with fake_hub.cache_at(tmp_path / "hub", offline) as patch:
            patch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
            assert store.find("owner/model").path == found.path
            assert_values(store.find("owner/model@v1"))
            with pytest.raises(
                UserError, match="owner/other: no such folder, it is not in the hub's cache, and"
            ) as error:
                store.find("owner/other")
            assert ("HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached") in str(error.value)


def test_beside_timms_weights_those_of_open_clip_are_downloaded(tmp_path, files):
    """timm's config.json and model.safetensors are the image tower's alone."""
    files |= {"config.json": b'{"architecture": "vit_base_patch32_clip_224"}', "open_clip_config.json": b"{}"}
    files["open_clip_model.safetensors"] = files["model.safetensors"]
    with fake_hub.hub(files, tmp_path / "hub"):
        names = {path.name for path in store.find("owner/model").path.iterdir()}
    assert "open_clip_model.safetensors" in names and "model.safetensors" not in names


def test_names_that_look_like_patterns(tmp_path, files):
    files |= {"vocab[1].txt": b"x", "vocab1.txt": b"y"}
    with fake_hub.hub(files, tmp_path / "hub"):
        assert (store.find("owner/model").path / "vocab[1].txt").read_bytes() == b"x"


def test_what_the_hub_refuses(tmp_path, files):
    with fake_hub.hub(files, tmp_path / "hub") as server:
        with pytest.raises(UserError, match="owner/other: no such folder nor model on the hub"):
            store.find("owner/other")
        with pytest.raises(UserError, match="owner/model@v3: the hub has no revision 'v3'"):
            store.find("owner/model@v3")
        with pytest.raises(UserError, match="no name that a model on the hub can have"):
            store.find("owner/model--x..")
        server.refusal = "GatedRepo"
        with pytest.raises(UserError, match="owner/model: .*agreed to its terms"):
            store.find("owner/model")
        server.refusal, server.refusal_of_files = "", "GatedRepo"  # so the hub itself does: its lists are for all
        with pytest.raises(UserError, match="owner/model: .*agreed to its terms"):
            store.find("owner/model")
        assert [path for _, path in server.asked if "/resolve/" in path]
        server.asked.clear()
        server.refusal_of_files = "Other"
        with pytest.raises(UserError, match="owner/model: downloading stopped"):
            store.find("owner/model")
        server.asked.clear()
        server.refusal_of_files = ""
        for name in list(files):
            if name.endswith(".safetensors") and "/" not in name:
                del files[name]
        with pytest.raises(UserError, match="owner/model has its weights only as a pickle, pytorch_model.bin"):
            store.find("owner/model")
        assert not [path for _, path in server.asked if "/resolve/" in path]  # nothing is brought before that is said
        assert store.find("owner/model", allow_pickle=True).has("pytorch_model.bin")
        del files["pytorch_model.bin"]
        with pytest.raises(UserError, match="owner/model@v1 has no weights"):
            store.find("owner/model@v1")


def test_shards_come_with_their_index(tmp_path, files):
    del files["model.safetensors"]
    made = tmp_path / "made"
    made.mkdir()
    store.save_tensors(made / "model.safetensors", VALUES, max_shard_bytes=24)
    shards = contents(made)
    assert len(shards) == 3
    files |= shards | {"model.fp16-00001-of-00001.bin": b"not wanted"}
    with fake_hub.hub(files, tmp_path / "hub"):
        found = store.find("owner/model")
        assert set(contents(found.path)) == {"config.json", "tokenizer.model", "1_Pooling/config.json", *shards}
        assert_values(found)


def test_a_download_that_is_not_what_the_hub_promises(tmp_path, files):
    content = files["model.safetensors"]
    with fake_hub.hub(files, tmp_path / "hub") as server:
        server.sent["model.safetensors"] = content[:-4] + b"\1\2\3\4"
        with pytest.raises(UserError, match="owner/model: model.safetensors is damaged.*its checksum on the hub"):
            store.open_tensors(store.find("owner/model"))
        server.sent["tokenizer.model"] = b"Pieces"
        with pytest.raises(UserError, match="owner/model@v1: tokenizer.model is damaged"):
            (tmp_path / "hub" / "models--owner--model" / "blobs" / hashlib.sha256(b"pieces").hexdigest()).unlink()
            store.find("owner/model@v1")


def test_a_cache_filled_by_others(hub_cache, files):
    snapshot = fake_hub.fill(hub_cache, files)
    old = fake_hub.fill(hub_cache, files | {"config.json": b'{"model_type": "old"}'}, "v1")
    assert store.find("owner/model").path.resolve() == snapshot.resolve()
    assert store.find("owner/model").read_json("config.json") == {"model_type": "clip"}
    for pinned in (("owner/model@v1", None), ("owner/model", "v1"), ("owner/model", fake_hub.COMMITS["v1"])):
        assert store.find(*pinned).read_json("config.json") == {"model_type": "old"}
        assert store.find(*pinned).path.resolve() == old.resolve()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        store.find("owner/model@v3")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="owner/model has its weights only as a pickle"):
        store.open_tensors(store.find("owner/model"))


def test_a_blob_is_verified_until_it_was_right_once(hub_cache, files, monkeypatch):
    read = []
    sha256 = checksums._sha256
    monkeypatch.setattr(checksums, "_sha256", lambda path: read.append(path.name) or sha256(path))
    blob = (fake_hub.fill(hub_cache, files) / "model.safetensors").resolve()
    for _ in range(2):
        assert_values(store.find("owner/model"))
        assert read.count(blob.name) == 1  # and not at the second time
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    os.utime(blob, ns=(0, 0))
    for _ in range(2):
        with pytest.raises(UserError, match="owner/model: model.safetensors is damaged"):
            store.open_tensors(store.find("owner/model"))
    assert read.count(blob.name) == 3


def test_checksums_of_a_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    store.save_tensors(folder / "model.safetensors", VALUES)
    (folder / "config.json").write_text("{}")
    (folder / "odd\n\\name.txt").write_text("odd")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    store.write_checksums(folder)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    before = (folder / "SHA256SUMS").read_text()
    store.write_checksums(folder)
    assert (folder / "SHA256SUMS").read_text() == before and before.count("\n") == 4
    assert_values(store.find(folder))

    (folder / "SHA256SUMS").write_text(
        "\n" + before.replace("  ", " *./").upper().replace("*./CONFIG.JSON", "*./config.json")
    )
    (folder / "config.json").write_text("{ }")
    with pytest.raises(UserError, match="model: config.json is damaged or was changed: .* its line in SHA256SUMS"):
        store.find(folder)
    (folder / "SHA256SUMS").write_text(before)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="model has no config.json, which SHA256SUMS lists"):
        store.find(folder)
    (folder / "config.json").write_text("{}")
    (folder / "odd\n\\name.txt").write_text("Odd")
    with pytest.raises(UserError, match="name.txt is damaged"):
        store.find(folder)
    (folder / "odd\n\\name.txt").write_text("odd")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + b"\1")
    with pytest.raises(UserError, match="model.safetensors is damaged or was changed"):
        store.open_tensors(store.find(folder))
    (folder / "SHA256SUMS").write_text(before + "what is this\n")
    with pytest.raises(UserError, match="SHA256SUMS is damaged: line 5"):
        store.find(folder)


def test_checksums_of_shards(tmp_path):
    store.save_tensors(tmp_path / "model.safetensors", VALUES, max_shard_bytes=24)
    store.write_checksums(tmp_path)
    assert_values(store.find(tmp_path))
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is damaged or was changed"):
        store.open_tensors(store.find(tmp_path))


def test_a_pickle_is_not_opened_before_its_checksum_is_right(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"right")
    store.write_checksums(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"wrong")
    monkeypatch.setattr(store, "read_pickle", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="pytorch_model.bin is damaged or was changed"):
        store.open_tensors(store.find(tmp_path), allow_pickle=True)


def test_checksums_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    store.save_tensors(tmp_path / "model.safetensors", VALUES)
    store.write_checksums(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "file"))
    assert_values(store.find(tmp_path))


@pytest.fixture
def remote(files):
    system = fsspec.filesystem("memory")
    for name, content in files.items():
        system.pipe(f"/bucket/model/{name}", content)
    yield system
    system.rm("/bucket", recursive=True)


def test_a_remote_folder_is_copied_once(remote, files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMJAX_CACHE", "cache")  # a relative one
    copied = []
    get = type(remote).get_file
    monkeypatch.setattr(
        type(remote), "get_file", lambda self, name, *rest: copied.append(name) or get(self, name, *rest)
    )
    found = store.find("memory://bucket/model/")
    assert found.name == "memory://bucket/model/" and contents(found.path) == wanted(files)
    assert_values(found)
    assert sorted(copied) == sorted(f"/bucket/model/{name}" for name in wanted(files))
    copied.clear()
    assert store.find("memory://bucket/model").path == found.path and not copied
    remote.pipe("/bucket/model/config.json", b'{"model_type": "another"}')
    changed = store.find("memory://bucket/model")
    assert copied == ["/bucket/model/config.json"]  # and not the weights again
    assert changed.read_json("config.json") == {"model_type": "another"}
    assert found.read_json("config.json") == {"model_type": "clip"}
    assert not list(tmp_path.rglob(".*"))  # nothing half copied
    (tmp_path / "cache" / "remote").rename(tmp_path / "away")
    assert_values(store.find("memory://bucket/model"))


def test_a_client_that_keeps_listings(remote, monkeypatch):
    kept, find = {}, type(remote).find
    monkeypatch.setattr(type(remote), "find", lambda self, path, **how: kept.setdefault(path, find(self, path, **how)))
    monkeypatch.setattr(type(remote), "invalidate_cache", lambda self, path=None: kept.clear())
    assert not store.find("memory://bucket/model").has("vocab.txt")
    remote.pipe("/bucket/model/vocab.txt", b"words")
    assert store.find("memory://bucket/model").has("vocab.txt")


def test_a_copy_that_stops_half_way(remote, monkeypatch, tmp_path):
    get = type(remote).get_file

    def stop(self, name, target, **rest):
        get(self, name, target, **rest)
        raise ConnectionError("reset\nby peer")

    with monkeypatch.context() as patch:
        patch.setattr(type(remote), "get_file", stop)
        with pytest.raises(UserError, match="cannot read 'memory://bucket/model': reset by peer"):
            store.find("memory://bucket/model")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert_values(store.find("memory://bucket/model"))


def test_remote_folders_that_are_none(remote, files):
    for address in ("memory://bucket/nothing", "memory://bucket/model/config.json"):
        with pytest.raises(UserError, match=f"there is no folder {address}, or it is empty"):
            store.find(address)
    with pytest.raises(UserError, match="cannot read 'nowhere://bucket'"):
        store.find("nowhere://bucket")
    for name in files:
        if name.endswith("safetensors"):
            remote.rm(f"/bucket/model/{name}")
    with pytest.raises(UserError, match="memory://bucket/model has its weights only as a pickle"):
        store.find("memory://bucket/model")
    assert store.find("memory://bucket/model", allow_pickle=True).has("pytorch_model.bin")


def test_finding_imports_no_other_library():
    code = (
        "import sys, mmjax.interop.store; assert not {'huggingface_hub', 'fsspec', 'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
