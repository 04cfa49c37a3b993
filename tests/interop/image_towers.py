"""Small models of ViT, BEiT and DINOv2, with every part that these families have."""

import json
from typing import NamedTuple

import numpy as np

from tests.interop import folders

SIZE = 16  # of the images that all of them read
TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIZE,
    "patch_size": 4,
}
BEIT = TOWER | {"layer_scale_init_value": 0.3}
DINOV2 = {key: value for key, value in TOWER.items() if key != "intermediate_size"} | {"image_size": 24}
SQUARE = {"height": SIZE, "width": SIZE}
CLASSES = {"id2label": {str(index): f"class {index}" for index in range(5)}}
CLASSES |= {"label2id": {label: int(index) for index, label in CLASSES["id2label"].items()}}


class Case(NamedTuple):
    """A model: the class in transformers, its config.json without the kind, and its preprocessor_config.json."""

    family: str
    kind: str
    settings: dict
    processor: dict

    def write(self, folder):
        """A folder of it with deterministic weights."""
        settings = self.settings | {"model_type": self.family, "architectures": [self.kind]}
        return folders.write(folder, self.family, settings, preprocessor_config=self.processor)

    def write_processor(self, folder):
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor))


_VIT = {"image_processor_type": "ViTImageProcessor", "size": SIZE}
_BEIT = {"image_processor_type": "BeitImageProcessor", "size": SQUARE, "do_center_crop": False, "resample": 2}
_CUT = _BEIT | {"size": {"height": 20, "width": 20}, "do_center_crop": True, "crop_size": SQUARE}
_DINOV2 = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 18}, "crop_size": SQUARE}
_DINOV2 |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CASES = {
    "vit": Case("vit", "ViTModel", TOWER, _VIT),
    "vit classifier": Case("vit", "ViTForImageClassification", TOWER | CLASSES, _VIT),
    "beit shared": Case(
        "beit",
        "BeitForMaskedImageModeling",
        BEIT | {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 12},
        _BEIT,
    ),
    "beit layers": Case("beit", "BeitModel", BEIT | {"use_relative_position_bias": True}, _CUT),
    "beit absolute": Case(
        "beit",
        "BeitModel",
        BEIT | {"use_absolute_position_embeddings": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0},
        _BEIT,
    ),
    "beit classifier": Case(
        "beit", "BeitForImageClassification", BEIT | CLASSES | {"use_relative_position_bias": True}, _BEIT
    ),
    "dinov2": Case("dinov2", "Dinov2Model", DINOV2, _DINOV2),
    "dinov2 gated": Case("dinov2", "Dinov2Model", DINOV2 | {"use_swiglu_ffn": True, "use_mask_token": False}, _DINOV2),
    "dinov2 classifier": Case("dinov2", "Dinov2ForImageClassification", DINOV2 | CLASSES, _DINOV2),
}


def hidden_patches(count, patches):
    """Which patches are hidden from a model: bool [count, patches]."""
    return np.random.default_rng(5).random((count, patches)) < 0.4


def ours(model, pixels):
    """What our model makes of images of its own size: `features`, and `logits` where it has a head."""
    count, encoder = len(pixels), model.config.model.encoders.image
    found = {"features": model.features_rows("image", count, lambda rows: pixels[rows])}
    if "classifier" in model.config.model.parts:
        found["logits"] = model.classify_rows(count, lambda rows: pixels[rows])
    if "image_tokens" in model.config.model.parts:
        patch = int(encoder.variant.partition("/")[2])
        hidden = hidden_patches(count, (encoder.image_size // patch) ** 2)
        found["logits"] = model.predict_image_tokens([*pixels], hidden)
    return found


def theirs(model, inputs):
    """The same of a model in transformers; `features` only where it gives what ours pools."""
    import torch

    with torch.inference_mode():
        if hasattr(model, "lm_head"):
            hidden = hidden_patches(len(inputs), (model.config.image_size // model.config.patch_size) ** 2)
            return {
                "logits": model(inputs, bool_masked_pos=torch.tensor(hidden)).logits.numpy(),
                "features": model.layernorm(model.beit(inputs).last_hidden_state)[:, 1:].mean(1).numpy(),
            }
        if hasattr(model, "classifier"):
            return {"logits": model(inputs).logits.numpy()}
        out = model(inputs)
        pooled = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
        return {"features": pooled.numpy()}
