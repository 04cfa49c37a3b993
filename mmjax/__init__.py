"""mmjax: multimodal pretraining in JAX."""

import importlib

__version__ = "0.1.0"


def load(workdir, step=None):
    """Loads the model of a training run: see `mmjax.api.load`."""
    from mmjax import api  # importing mmjax stays light

    return api.load(workdir, step)


def __getattr__(name):
    if name == "explain":  # likewise
        return importlib.import_module("mmjax.explain")
    raise AttributeError(f"module 'mmjax' has no attribute '{name}'")
