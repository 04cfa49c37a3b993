"""Files that other libraries wrote are read here, and the other way round."""

import pickle

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import safetensors
import safetensors.torch as safetensors_torch
import torch

from mmjax.errors import UserError
from mmjax.interop import pickles, store
from mmjax.interop.tensors import DTYPES, read_safetensors, save_tensors
from tests.data.make_goldens_image import import_torchvision

TORCH = {name: getattr(torch, theirs) for theirs, name in pickles._DTYPES.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))


def bits(dtype, seed=0):
    raw = np.random.default_rng(seed).integers(0, 256, 12 * dtype.itemsize, np.uint8)
    return (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(3, 4)


def as_torch(value, name):
    return torch.tensor(value.reshape(-1).view(np.uint8)).view(TORCH[name]).reshape(value.shape)


EVERY = {name: bits(dtype) for name, dtype in DTYPES.items()}


def folder_of(tmp_path):
    return store.Folder(tmp_path, "here")


def test_every_dtype_is_known_to_torch():
    assert TORCH.keys() == DTYPES.keys()


def test_safetensors_reads_what_we_write(tmp_path):
    save_tensors(tmp_path / "model.safetensors", EVERY | {"scalar": np.float32(3)})
    theirs = safetensors_torch.load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == {*EVERY, "scalar"} and theirs["scalar"].shape == ()
    for name, value in EVERY.items():
        assert theirs[name].dtype == TORCH[name] and theirs[name].shape == value.shape
        assert theirs[name].view(torch.uint8).numpy().tobytes() == value.tobytes()
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_safetensors_writes(tmp_path):
    safetensors_torch.save_file(
        {name: as_torch(value, name) for name, value in EVERY.items()}, tmp_path / "model.safetensors"
    )
    ours = read_safetensors(tmp_path / "model.safetensors", "here")
    assert ours.names() == {name: ((3, 4), name) for name in EVERY}
    for name, value in EVERY.items():
        assert ours.get(name).dtype == value.dtype and ours.get(name).tobytes() == value.tobytes()


def test_the_same_files_are_refused(tmp_path):
    """Each cut, and each changed byte of the header, that their reader refuses is refused here."""
    save_tensors(tmp_path / "whole", {"a": np.ones(2, np.float32), "b": np.ones(3, np.int16)})
    whole = (tmp_path / "whole").read_bytes()
    changed = [whole[:size] for size in range(len(whole))]
    draw = np.random.default_rng(0)
    for _ in range(500):
        content = bytearray(whole)
        content[draw.integers(0, len(whole) - 14)] = draw.integers(0, 256)
        changed.append(bytes(content))
    refused = 0
    for content in changed:
        (tmp_path / "changed").write_bytes(content)
        try:
            safetensors_torch.load(content)
        except Exception:
            refused += 1
            with pytest.raises(UserError, match=r"^here: file"):
                read_safetensors(tmp_path / "changed", "here: file")
    assert refused > 400


def test_transformers_reads_our_shards_and_we_read_theirs(tmp_path):
    transformers = pytest.importorskip("transformers")
    try:
        import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(settings)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size="20KB")
    assert (theirs / "model.safetensors.index.json").exists()
    tensors = store.open_tensors(store.find(theirs))
    wanted = {name: value.numpy() for name, value in model.state_dict().items()}
    assert {name: shape for name, (shape, _) in tensors.names().items()} == {n: v.shape for n, v in wanted.items()}
    for name, value in wanted.items():
        np.testing.assert_array_equal(tensors.get(name), value)

    ours.mkdir()
    settings.save_pretrained(ours)
    save_tensors(ours / "model.safetensors", {name: tensors.get(name) for name in wanted}, max_shard_bytes=20_000)
    assert len(list(ours.glob("model-*-of-*.safetensors"))) > 2
    again, report = transformers.BertModel.from_pretrained(ours, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), wanted[name])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "epoch_32.pt"])
def test_a_pickle_that_is_allowed(tmp_path, name):
    state = {key: as_torch(value, key) for key, value in EVERY.items()}
    state["transposed"] = torch.arange(12.0).reshape(3, 4).T
    state["parameter"] = torch.nn.Parameter(torch.tensor(2.0))
    torch.save(state, tmp_path / name)
    with pytest.raises(UserError, match=f"only as a pickle, {name}"):
        store.open_tensors(folder_of(tmp_path))
    tensors = store.open_tensors(folder_of(tmp_path), allow_pickle=True)
    assert tensors.names() == {key: ((3, 4), key) for key in EVERY} | {
        "transposed": ((4, 3), "F32"),
        "parameter": ((), "F32"),
    }
    for key, value in EVERY.items():
        assert tensors.get(key).dtype == value.dtype and tensors.get(key).tobytes() == value.tobytes()
    assert tensors.get("transposed").tolist() == np.arange(12.0).reshape(3, 4).T.tolist()
    assert tensors.get("parameter") == 2


def test_pickles_of_training_and_of_old_versions(tmp_path):
    state = {"module.a": torch.ones(2, dtype=torch.bfloat16), "module.b": torch.zeros(3)}
    for old in (False, True):
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt", _use_new_zipfile_serialization=not old)
        tensors = store.open_tensors(folder_of(tmp_path), allow_pickle=True)
        assert tensors.names() == {"a": ((2,), "BF16"), "b": ((3,), "F32")}
        assert tensors.get("a").tolist() == [1, 1] and tensors.get("a").dtype == ml_dtypes.bfloat16
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "epoch_3.pt")
    assert store.open_tensors(folder_of(tmp_path), allow_pickle=True).names().keys() == {"module.a", "b"}


class Code:
    """What runs when a plain pickle is loaded."""

    ran = False

    def __reduce__(self):
        return setattr, (Code, "ran", True)


def test_a_pickle_runs_no_code(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Code()}, path)
    with pytest.raises(UserError, match="here: pytorch_model.bin: torch does not read it") as error:
        store.open_tensors(folder_of(tmp_path), allow_pickle=True)
    assert not Code.ran and "\n" not in str(error.value)
    pickle.loads(pickle.dumps(Code()))
    assert Code.ran  # so it would have


def test_pickles_that_hold_something_else(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content, message in {
        "list": ([torch.ones(1)], "holds no state dict"),
        "empty": ({}, "holds no state dict"),
        "number": ({"a": 3}, "holds no state dict: 'a' is a int"),
        "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor 'a' is torch.complex64"),
        "sparse": ({"a": torch.eye(2).to_sparse()}, "tensor 'a' is torch.float32, torch.sparse_coo"),
    }.values():
        torch.save(content, path)
        with pytest.raises(UserError, match=f"^here: pytorch_model.bin.*{message}"):
            store.open_tensors(folder_of(tmp_path), allow_pickle=True)
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="^here: pytorch_model.bin: torch does not read it"):
        store.open_tensors(folder_of(tmp_path), allow_pickle=True)
