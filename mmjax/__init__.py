"""mmjax: multimodal pretraining in JAX."""

import importlib

__version__ = "0.1.0"


def load(source, step=None, **options):
    """Loads a pretrained model, or that of a training run: see `mmjax.api.load`."""
    from mmjax import runtime  # importing mmjax stays light

    runtime.configure_jax()
    from mmjax import api

    return api.load(source, step, **options)


def __getattr__(name):
    if name in ("explain", "export"):  # likewise
        return importlib.import_module(f"mmjax.{name}")
    raise AttributeError(f"module 'mmjax' has no attribute '{name}'")
