"""Live models of open_clip, with random weights, beside ours."""

import json

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax.interop import pretrained, store
from mmjax.sharding.mesh import make_mesh
from tests.interop import peers

PREPROCESS = {"mean": [0.48, 0.45, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}


def library():
    """open_clip, or the test is skipped."""
    transformers = peers.transformers()
    found = pytest.importorskip("open_clip")
    with_generation(found.coca_model, transformers)
    return found


def with_generation(module, transformers):
    """open_clip's captions need a beam search that transformers 5 no longer has; all but beam search works without."""
    names = ("LogitsProcessorList", "RepetitionPenaltyLogitsProcessor", "MinLengthLogitsProcessor")
    for name in (*names, "MaxLengthCriteria", "StoppingCriteriaList"):
        setattr(module, name, getattr(transformers, name))
    module.GENERATION_TYPES["top_k"] = transformers.TopKLogitsWarper
    module._has_transformers = True


def build(folder, model_cfg, preprocess_cfg=PREPROCESS, seed=0, change=lambda model: None):
    """A model of open_clip in a folder of its layout, and itself; `change` is made to its random weights."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    open_clip = library()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    if hasattr(model, "text_decoder"):  # open_clip leaves it as the memory was
        model.text_decoder.text_projection.data.zero_()
    change(peers.randomized(model, seed))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def there_and_back(folder, exported, renamed=lambda name: name):
    """Ours, and open_clip's of what we export of it, tensor for tensor the same as in the folder.

    Args:
      folder: of open_clip.
      exported: a new one.
      renamed: a tensor's name there -> the one that it is exported by.
    """
    open_clip = library()
    model = api.load(folder, mesh=make_mesh(devices=jax.devices()[:1]))
    pretrained.save(exported, model.config, model.params, model.tokenizer, "open_clip")
    found, wanted = (store.open_tensors(store.find(each)) for each in (exported, folder))
    assert sorted(found.names()) == sorted(map(renamed, wanted.names()))
    for name in wanted.names():
        np.testing.assert_array_equal(found.get(renamed(name)), wanted.get(name), name)
    return model, open_clip.create_model_from_pretrained(f"local-dir:{exported}")[0].eval()


def features(model, pixels, ids):
    """Unit embeddings of images and of texts by ours."""
    inputs = {"image": pixels, "text": ids}
    return [model.encode_rows(name, len(each), lambda rows, own=each: own[rows]) for name, each in inputs.items()]


def their_features(reference, model, pixels, ids):
    """The same by open_clip's."""
    import torch

    with torch.inference_mode():
        image = reference.encode_image(peers.normalized(pixels, model.config.model.encoders.image), normalize=True)
        text = reference.encode_text(torch.tensor(ids.astype(np.int64)), normalize=True)
    return image.numpy(), text.numpy()


def ids(text_cfg, rows=3):
    """Texts of several lengths: a start token, words, the end token (the largest id), padding of 0."""
    length, end = text_cfg["context_length"], text_cfg["vocab_size"] - 1
    found = np.random.default_rng(1).integers(1, end - 1, (rows, length)).astype(np.int32)
    ends = np.linspace(length // 3, length - 1, rows).astype(int)
    found[np.arange(length) > ends[:, None]] = 0
    found[np.arange(rows), ends], found[:, 0] = end, end - 1
    return found
