"""Tensors in files: the format, read as it is written, and refused where it is damaged."""

import json
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.errors import UserError
from mmjax.interop import tensors
from mmjax.interop.tensors import DTYPES, read_safetensors, read_sharded, save_tensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def opened(tmp_path, content, name="model.safetensors"):
    (tmp_path / name).write_bytes(content)
    return read_safetensors(tmp_path / name, f"here: {name}")


def draw(dtype, shape, seed=0):
    """Random bytes as an array of the dtype: every value that it has, NaNs too."""
    raw = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_each_dtype_there_and_back(tmp_path, name):
    dtype = DTYPES[name]
    written = {f"{shape}": draw(dtype, shape) for shape in ((), (1,), (0, 3), (3, 5), (2, 3, 4))}
    written["transposed"] = draw(dtype, (4, 7)).T
    save_tensors(tmp_path / "model.safetensors", written)
    found = read_safetensors(tmp_path / "model.safetensors", "here")
    assert found.names() == {key: (value.shape, name) for key, value in written.items()}
    for key, value in written.items():
        read = found.get(key)
        assert read.dtype == dtype and read.shape == value.shape and read.tobytes() == value.tobytes()
        assert not read.flags.writeable and not read.flags.owndata and read.flags.aligned  # mapped, not copied


def test_big_endian_and_foreign_arrays_are_written_as_values(tmp_path):
    import jax.numpy as jnp

    save_tensors(tmp_path / "x.safetensors", {"big": np.arange(3, dtype=">i4"), "jax": jnp.ones(2, jnp.bfloat16)})
    found = read_safetensors(tmp_path / "x.safetensors", "here")
    assert found.get("big").tolist() == [0, 1, 2]
    assert found.get("jax").dtype == ml_dtypes.bfloat16 and found.get("jax").tolist() == [1, 1]
    with pytest.raises(TypeError, match="'c' is complex128, which safetensors has not"):
        save_tensors(tmp_path / "y.safetensors", {"c": np.ones(2, complex)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_data_is_not_brought_to_memory(tmp_path):
    save_tensors(tmp_path / "model.safetensors", {"large": np.ones(2**22, np.float32), "small": np.ones(1, np.float32)})
    tracemalloc.start()
    found = read_safetensors(tmp_path / "model.safetensors", "here")
    assert found.names() == {"large": ((2**22,), "F32"), "small": ((1,), "F32")}
    assert found.get("large")[-1] == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < found.get("large").nbytes
    with pytest.raises(UserError, match="here has no tensor 'other'"):
        found.get("other")


def test_tensors_of_several_dtypes_are_written_aligned(tmp_path):
    dtypes = (np.uint8, np.float64, ml_dtypes.bfloat16, np.float32)
    save_tensors(tmp_path / "x.safetensors", {f"{i}": np.ones(3, dtype) for i, dtype in enumerate(dtypes)})
    found = read_safetensors(tmp_path / "x.safetensors", "here")
    assert not any(found.get(name).flags.owndata for name in found.names())


def test_a_tensor_that_is_not_aligned(tmp_path):
    values = np.arange(4, dtype=np.float32)
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "values": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }
    found = opened(tmp_path, file_of(header, b"\7" + values.tobytes())).get("values")
    assert found.flags.aligned and found.tolist() == values.tolist()


def test_truncated_files_say_how_much_is_there(tmp_path):
    whole = file_of({"a": ENTRY}, bytes(8))
    for size in range(len(whole)):
        with pytest.raises(UserError, match=f"^here: model.safetensors is truncated: {size} bytes are there") as error:
            opened(tmp_path, whole[:size])
        if size >= len(whole) - 8:
            assert f"its header promises {len(whole)}" in str(error.value)
    with pytest.raises(UserError, match=f"is damaged: {len(whole) + 1} bytes are there, its header promises"):
        opened(tmp_path, whole + b"x")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "its header is no JSON object"),
        (b"{", "its header is no JSON"),
        (b"\xff", "its header is no JSON"),
        (b"[" * 100_000, "its header is no JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "its header is no JSON"),  # more digits than Python reads
        (b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": ' + json.dumps(ENTRY).encode() + b"}", "'a' is there twice"),
        ({"a": 1}, "tensor 'a': its entry has not a dtype"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "tensor 'a': its entry has not a dtype"),
        ({"a": ENTRY | {"dtype": "F31"}}, "tensor 'a': its dtype is 'F31', not one of F64, "),
        ({"a": ENTRY | {"shape": [-2]}}, "tensor 'a': .* whole numbers"),
        ({"a": ENTRY | {"shape": [2.0]}}, "tensor 'a': .* whole numbers"),
        ({"a": ENTRY | {"shape": [True, 2]}}, "tensor 'a': .* whole numbers"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "tensor 'a': its shape takes 8 bytes, its data_offsets -8"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "tensor 'a': .* whole numbers"),
        ({"a": ENTRY | {"shape": [3]}}, "tensor 'a': its shape takes 12 bytes, its data_offsets 8"),
        ({"a": ENTRY | {"shape": [2**62, 2**62]}}, "tensor 'a': its shape is too large"),
        ({"a": ENTRY | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, "tensor 'a': its shape is too large"),
        ({"a": ENTRY | {"shape": [1] * 33 + [2]}}, "tensor 'a': its shape is too large"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, "tensor 'a' leaves a gap: it begins at byte 8 and not at 0"),
        ({"a": ENTRY, "b": ENTRY}, "tensor 'b' overlaps the one before: it begins at byte 0 and not at 8"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, "tensor 'b' overlaps"),
        ({"\ud800": 1}, "tensor '.ud800'"),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, file_of(header, bytes(8)))
    assert str(error.value).startswith("here: model.safetensors ") and len(str(error.value)) < 600
    str(error.value).encode()  # it can be printed


def test_files_that_are_something_else(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is only a pointer of Git LFS: `git lfs pull`"):
        opened(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match="no safetensors file: its header would have"):
        opened(tmp_path, b"<!DOCTYPE html><html>")
    monkeypatch.setattr(tensors, "MAX_HEADER_BYTES", 10)
    with pytest.raises(UserError, match="its header would have 11 bytes"):
        opened(tmp_path, file_of(b" " * 11))
    with pytest.raises(UserError, match="here: No such file"):
        read_safetensors(tmp_path / "nothing", "here")
    with pytest.raises(UserError, match="here: Is a directory"):
        read_safetensors(tmp_path, "here")


NUMBERS = st.integers(0, 12) | st.integers(-(2**70), 2**70) | st.floats() | st.booleans() | st.just(10**4000)
LEAVES = st.none() | NUMBERS | st.text(max_size=3)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "C64"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=3) | JSON


def read_all_or_refuse(path):
    """Either each tensor is read, with the shape and dtype that the header says, or all are refused in one line."""
    try:
        found = read_safetensors(path, "here: file")
    except UserError as error:
        assert str(error).startswith("here: file") and len(str(error)) < 1000
        str(error).encode()
        return
    for name, (shape, dtype) in found.names().items():
        value = found.get(name)
        assert value.shape == shape and value.dtype == DTYPES[dtype]


@settings(max_examples=100, deadline=None)
@given(header=HEADERS, data=st.binary(max_size=24))
def test_hostile_headers_are_refused_or_right(tmp_path_factory, header, data):
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    path.write_bytes(file_of(header, data))
    read_all_or_refuse(path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_files_with_changed_bytes_are_refused_or_right(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "whole.safetensors").exists():
        arrays = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), ml_dtypes.bfloat16), "c": np.array(True)}
        save_tensors(folder / "whole.safetensors", arrays)
    content = bytearray((folder / "whole.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "changed.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_all_or_refuse(folder / "changed.safetensors")


SHARDED = {f"layer.{i}": np.full((4,), i, np.float32) for i in range(5)} | {"large": np.arange(20, dtype=np.float32)}


def sharded(folder):
    save_tensors(folder / "model.safetensors", SHARDED, max_shard_bytes=32)
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_shards_there_and_back(tmp_path):
    index = sharded(tmp_path)
    files = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    assert index["metadata"] == {"total_parameters": 40, "total_size": 160}
    assert [index["weight_map"][name] for name in SHARDED] == [files[i] for i in (0, 0, 1, 1, 2, 3)]
    found = read_sharded(tmp_path, index, "here: index")
    assert found.names() == {name: (value.shape, "F32") for name, value in SHARDED.items()}
    for name, value in SHARDED.items():
        np.testing.assert_array_equal(found.get(name), value)


def test_tensors_made_one_by_one_are_not_kept(tmp_path):
    size = 2**20
    pairs = ((f"{index:02d}", np.full(size, index, np.uint8)) for index in range(24))
    tracemalloc.start()
    save_tensors(tmp_path / "model.safetensors", pairs, max_shard_bytes=3 * size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(list(tmp_path.glob("*-of-00008.safetensors"))) == 8
    assert peak < 5 * size  # a file's three, and the first of the next


def test_index_that_does_not_fit_its_files(tmp_path):
    index = sharded(tmp_path)
    files = sorted(set(index["weight_map"].values()))

    def refused(message, **changes):
        with pytest.raises(UserError, match=f"^here: index.*{message}"):
            read_sharded(tmp_path, index | changes, "here: index")

    for weight_map in (None, [], {}, "x"):
        refused("has no weight_map", weight_map=weight_map)
    refused("has no weight_map", metadata=3)
    refused("promises 161 bytes of tensors, and its files hold 160", metadata={"total_size": 161})
    for file in ("../model.safetensors", "/etc/passwd", "model.bin", 5, None):
        refused("which is no safetensors file beside it", weight_map={"layer.0": file})
    refused(f"{files[1]} has the tensor 'layer.0', and it has not", weight_map={"layer.0": files[1]})
    (tmp_path / files[3]).write_bytes((tmp_path / files[3]).read_bytes()[:-1])
    refused(f"{files[3]} is truncated")
    (tmp_path / files[2]).unlink()
    refused(f"names {files[2]}, which is not there")
    del index["metadata"]
    few = {name: file for name, file in index["weight_map"].items() if file in files[:2]}
    assert len(read_sharded(tmp_path, index | {"weight_map": few}, "here").names()) == 4


def test_nothing_is_left_of_a_save_that_fails(tmp_path):
    def pairs():
        yield from SHARDED.items()
        yield "layer.0", np.zeros(1)

    with pytest.raises(ValueError, match="'layer.0' is there twice"):
        save_tensors(tmp_path / "model.safetensors", pairs(), max_shard_bytes=16)
    assert not list(tmp_path.iterdir())


def test_another_layout_that_would_be_read_instead_is_not_left_beside(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": np.ones(2)})
    save_tensors(path, {"a": np.zeros(2)})
    with pytest.raises(UserError, match="model.safetensors is there from another model: remove it first"):
        save_tensors(path, SHARDED, max_shard_bytes=16)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    path.unlink()
    sharded(tmp_path)
    with pytest.raises(UserError, match="model.safetensors.index.json is there from another model"):
        save_tensors(path, {"a": np.ones(2)})


def test_no_tensors(tmp_path):
    save_tensors(tmp_path / "model.safetensors", {}, metadata={})
    assert read_safetensors(tmp_path / "model.safetensors", "here").names() == {}
