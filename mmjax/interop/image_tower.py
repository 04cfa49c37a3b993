"""What the families of a single image tower share: ViT, BEiT, DINOv2."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop.family import TENSORS, Json
from mmjax.interop.table import PATCHES, TOKEN, Row, dense

# The tower is compared with no other one, so what scales similarities has no tensor.
FIXED = {"logit_scale": 0.0, "logit_bias": 0.0}


def is_in(name: str, files: Mapping[str, Json], otherwise: bool) -> bool:
    """Whether a folder has a tensor; `otherwise` where the names of its tensors are not known."""
    return name in files[TENSORS] if TENSORS in files else otherwise


def side(theirs: Json, key: str) -> int:
    """An `image_size` or `patch_size`, which can be one number or two.

    Raises:
      UserError: they are not equal.
    """
    sides = theirs[key] if isinstance(theirs[key], list | tuple) else [theirs[key]]
    if len({*sides}) != 1:
        raise UserError(f"config.json: {key} {theirs[key]} is no square, and a model here reads squares")
    return sides[0]


def check(theirs: Json, **needed: Any) -> None:
    """Raises UserError, naming the setting, where one of theirs has another value than these."""
    for key, value in needed.items():
        if theirs.get(key, value) != value:
            raise UserError(f"config.json: {key} is {theirs[key]}, and a model here can have {value} alone")


def to_config(encoder: ConfigDict, labels: tuple[str, ...] = (), reads: str = "pooled") -> ConfigDict:
    """The config of a tower without a projection, and of a classifier where there are labels."""
    from mmjax.models.multimodal import tower_size

    config = configs.default()
    encoder.projection = False
    config.model.embed_dim = tower_size(encoder).width
    config.model.logit_scale, config.model.logit_bias = 1.0, 0.0
    config.model.encoders.image = encoder
    config.model.parts = ("image",)
    if labels:
        config.model.classifier = configs.classifier(labels=labels, reads=reads)
        config.model.parts += ("classifier",)
    return config


def labels_of(theirs: Json) -> tuple[str, ...]:
    """The names of a classifier's classes, in their order.

    Raises:
      UserError: it is another task than to choose one of several classes.
    """
    if theirs.get("problem_type") is not None:
        check(theirs, problem_type="single_label_classification")
    named = theirs.get("id2label") or {index: f"LABEL_{index}" for index in range(theirs.get("num_labels", 2))}
    return tuple(str(named[key]) for key in sorted(named, key=int))


def class_settings(config: ConfigDict) -> dict[str, Any]:
    """`labels_of`, the other way; nothing where there is no classifier."""
    if "classifier" not in config.model.parts:
        return {}
    labels = config.model.classifier.labels
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def embeddings(encoder: ConfigDict, theirs: str) -> Iterator[Row]:
    """The rows of what comes before the layers."""
    yield Row("image/class_token", f"{theirs}.cls_token", TOKEN)
    yield Row("image/patches/patch_embed/kernel", f"{theirs}.patch_embeddings.projection.weight", PATCHES)
    yield Row("image/patches/patch_embed/bias", f"{theirs}.patch_embeddings.projection.bias")
    if encoder.position != "none":
        yield Row("image/positions/position", f"{theirs}.position_embeddings", TOKEN)


def attention(ours: str, theirs: str, key_bias: bool = True) -> Iterator[Row]:
    """The rows of a layer's attention."""
    for name in ("query", "key", "value"):
        yield from dense(f"{ours}/{name}", f"{theirs}.attention.{name}", key_bias or name != "key")
    yield from dense(f"{ours}/out", f"{theirs}.output.dense")


def classifier(config: ConfigDict) -> Iterator[Row]:
    """The rows of the classifier, where there is one."""
    if "classifier" in config.model.parts:
        yield from dense("classifier", "classifier")
