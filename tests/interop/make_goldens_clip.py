"""Writes goldens/clip.npz: what `transformers.CLIPModel` makes of the inputs of test_clip.py.

python -m tests.interop.make_goldens_clip
"""

import numpy as np
import torch

from mmjax.interop import clip
from tests.interop import folders, peers
from tests.interop.test_clip import ids, pixels, settings_with


def main():
    transformers = peers.transformers()
    results = {}
    for activation in ("quick_gelu", "gelu"):
        model = transformers.CLIPModel(transformers.CLIPConfig(**settings_with(activation))).eval()
        model.load_state_dict(
            {name: torch.tensor(folders.filled(name, value.shape)) for name, value in model.state_dict().items()}
        )
        encoder = clip.to_config(settings_with(activation), {}).model.encoders.image
        with torch.inference_mode():
            out = model(pixel_values=peers.normalized(pixels(), encoder), input_ids=torch.tensor(ids()))
        results |= {f"{activation}_image": out.image_embeds.numpy(), f"{activation}_text": out.text_embeds.numpy()}
        results[f"{activation}_probabilities"] = out.logits_per_image.softmax(dim=1).numpy()
    np.savez_compressed(folders.GOLDENS / "clip.npz", **results)


if __name__ == "__main__":
    main()
