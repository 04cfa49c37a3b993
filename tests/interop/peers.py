"""The live libraries that pretrained models come from, with random weights, beside ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import api
from mmjax.interop import pretrained
from mmjax.sharding.mesh import make_mesh
from tests.data.make_goldens_image import import_torchvision
from tests.interop import folders

TOLERANCE = 1e-4  # relative, float32


def transformers():
    """The library, or the test is skipped."""
    library = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    try:
        import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    library.logging.set_verbosity_error()
    return library


def randomized(model, seed=0):
    """The same model in evaluation mode, with seeded weights that are all in use: no biases of 0, no scales of 1."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.05
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def normalized(pixels, encoder):
    """What their image tower is given: float [batch, 3, height, width]."""
    import torch

    scaled = (pixels / 255 - np.array(encoder.mean)) / np.array(encoder.std)
    return torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32)


def there_and_back(reference, tmp_path, prepare=lambda folder: None, ignored=()):
    """Their model saved and loaded here, and what we export of it, tensor for tensor the same but for what is ignored.

    Returns:
      Our model, and the folder of the export.
    """
    source, exported = tmp_path / "theirs", tmp_path / "ours"
    reference.save_pretrained(source)
    prepare(source)
    # On one device: a model of published size would lie on each of the tests' eight.
    model = api.load(source, mesh=make_mesh(devices=jax.devices()[:1]))
    pretrained.save(exported, model.config, model.params, model.tokenizer)
    folders.assert_same_tensors(source, exported, ignored)
    return model, exported


def applied(model, method, *arguments):
    """What a method of our Flax module returns, of a model on one device."""
    with jax.set_mesh(model.mesh):
        inputs = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, arguments)
        found = model.module.apply({"params": model.params}, *inputs, method=method)
        return jax.tree.map(np.asarray, found)
