"""Writes goldens/open_clip.npz: what open_clip makes of the inputs of test_open_clip.py.

python -m tests.interop.make_goldens_open_clip
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.interop import folders, open_clip_peer, peers
from tests.interop.test_open_clip import MODELS, PREPROCESS, TIMM, TRUNK, fill, ids, pixels


def register():
    """The tower of the tests as a model of timm."""
    import timm.models.vision_transformer as vit

    def make(pretrained=False, **options):
        size = TRUNK.size
        own = {"img_size": TRUNK.image_size, "patch_size": TRUNK.patch, "embed_dim": size.width, "depth": size.depth}
        own |= {"num_heads": size.heads, "mlp_ratio": size.mlp_dim / size.width, "class_token": False}
        options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None), options.pop("cache_dir", None)
        model = vit.VisionTransformer(**own | {"global_pool": "map", "act_layer": "gelu_tanh"} | options)
        model.default_cfg = {}
        return model

    make.__name__, make.__module__ = TIMM, vit.__name__
    vit.register_model(make)


def main():
    open_clip_peer.library()
    register()
    results, encoder = {}, type("Encoder", (), {name: PREPROCESS[name] for name in ("mean", "std")})
    for name, settings in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = open_clip_peer.build(Path(folder), copy.deepcopy(settings))
        model.load_state_dict(
            {key: torch.tensor(fill(key, tuple(value.shape))) for key, value in model.state_dict().items()}
        )
        images, texts = peers.normalized(pixels(), encoder), torch.tensor(ids().astype(np.int64))
        with torch.inference_mode():
            results[f"{name}_image"] = model.encode_image(images, normalize=True).numpy()
            results[f"{name}_text"] = model.encode_text(texts, normalize=True).numpy()
            results[f"{name}_scale"] = model.logit_scale.exp().numpy()
            if name == "coca":
                results["coca_captions"] = model(images, texts)["logits"].numpy()
    np.savez_compressed(folders.GOLDENS / "open_clip.npz", **results)


if __name__ == "__main__":
    main()
