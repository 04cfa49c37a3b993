"""Writes goldens/siglip.npz: what transformers' SigLIP and SigLIP 2 make of the inputs of test_siglip.py.

python -m tests.interop.make_goldens_siglip
"""

import numpy as np
import torch
from PIL import Image

from mmjax.interop.registry import FAMILIES
from tests.interop import folders, peers
from tests.interop.test_siglip import PROCESSORS, SETTINGS, SIZES, ids, pictures


def features(transformers, kind, images):
    """Of the model whose tensors `folders.filled` draws."""
    name = kind.capitalize()
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SETTINGS[kind])).eval()
    model.load_state_dict(
        {key: torch.tensor(folders.filled(key, tuple(value.shape))) for key, value in model.state_dict().items()}
    )
    with torch.inference_mode():
        out = model(**images, input_ids=torch.tensor(ids()))
    probabilities = out.logits_per_image.sigmoid().numpy()
    names = f"{kind}_image", f"{kind}_text", f"{kind}_probabilities"
    return dict(zip(names, (out.image_embeds.numpy(), out.text_embeds.numpy(), probabilities), strict=True))


def positions():
    """A table of 5 x 5 and what it becomes."""
    table = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)
    grid, results = torch.tensor(table).reshape(1, 5, 5, 3).permute(0, 3, 1, 2), {"table": table}
    for size in ((2, 9), (3, 3), (1, 30), (5, 6), (30, 1)):
        found = torch.nn.functional.interpolate(grid, size, mode="bilinear", align_corners=False, antialias=True)
        results["table_{}x{}".format(*size)] = found[0].permute(1, 2, 0).reshape(-1, 3).numpy()
    return results


def main():
    transformers = peers.transformers()
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches as fit

    encoder = FAMILIES["siglip"].to_config(SETTINGS["siglip"], {}).model.encoders.image
    results = features(transformers, "siglip", {"pixel_values": peers.normalized(folders.pixels(4, 8), encoder)})
    processor = transformers.Siglip2ImageProcessorPil(**PROCESSORS["siglip2"])
    results |= features(
        transformers, "siglip2", dict(processor(list(map(Image.fromarray, pictures())), return_tensors="pt"))
    )
    processor = transformers.Siglip2ImageProcessorPil(**PROCESSORS["siglip2"], do_rescale=False, do_normalize=False)
    patches = processor(list(map(Image.fromarray, pictures())), return_tensors="np")
    results |= {"patches": patches["pixel_values"].astype(np.uint8), "shape": patches["spatial_shapes"]}
    results["grids"] = np.array([np.array(fit(*size)) // size[2] for size in SIZES])
    np.savez_compressed(folders.GOLDENS / "siglip.npz", **results | positions())


if __name__ == "__main__":
    main()
