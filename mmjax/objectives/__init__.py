"""Training objectives by name: `loss, metrics = objective(outputs, batch, rng, **options)`.

A new one is a file here and a line below; its options and their defaults are in `mmjax.config.OBJECTIVES`.
`outputs` is `mmjax.models.outputs.Outputs`: the towers' outputs, and the model's other parts as functions.
`batch["rng"]` holds a key for each row: what is drawn for a row comes from there, so that it does not depend on how
the batch is split. Rows whose `batch["has_text"]` is False have no caption; where it is missing all have one.

An objective that compares rows of the batch with each other may be `across_rows`: then it reads only the `embedding`s
and the logit parameters of `outputs` (and of its teacher), and always sees the whole batch. Any other one may be run
on a part of the rows: its loss and its metrics are means over rows, or over what its metric `count` counts in them
(tokens, say).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mmjax.objectives import captioning, contrastive, distillation, masked, matching


class Objective(NamedTuple):
    """What computes it, which inputs the batch has to have, and which parts of the model it reads."""

    run: Callable
    inputs: tuple[str, ...]
    parts: tuple[str, ...]
    across_rows: bool = False
    teacher: bool = False


_BOTH = ("image", "text")
OBJECTIVES = {
    "sigmoid": Objective(contrastive.sigmoid, _BOTH, _BOTH, across_rows=True),
    "softmax": Objective(contrastive.softmax, _BOTH, _BOTH, across_rows=True),
    "matching": Objective(matching.matching, _BOTH, (*_BOTH, "fusion", "matching")),
    "captioning": Objective(captioning.captioning, _BOTH, ("image", "decoder")),
    # It reads not the batch's texts but what it makes of them: their tokens are computed where others read them.
    "masked": Objective(masked.masked, ("text",), ("image", "fusion", "masked")),
    "feature_distillation": Objective(distillation.features, (), (), teacher=True),
    "similarity_distillation": Objective(distillation.similarity, _BOTH, _BOTH, across_rows=True, teacher=True),
}


def inputs_of(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What a batch has to have for an objective, an entry of `config.objectives`."""
    return (*OBJECTIVES[entry["kind"]].inputs, *entry.get("modalities", ()))


def parts_read(entry: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a model (`config.model`) that an objective reads, where the batch has the inputs for them."""
    parts = (*OBJECTIVES[entry["kind"]].parts, *entry.get("modalities", ()))
    return (*parts, "text") if "decoder" in parts and model["decoder"].get("reads") == "text" else parts


def parts_of(config: Mapping[str, Any]) -> frozenset[str]:
    """The parts of the model (`mmjax.models.multimodal.PARTS`) that a config's objectives read, and `model.parts`."""
    parts = {part for entry in config["objectives"].values() for part in parts_read(entry, config["model"])}
    inputs = {name for entry in config["streams"].values() for name in entry["inputs"]}
    if config["streams"]:
        parts -= {"image"} - inputs
    if "masked" in parts:
        parts.add("text")
    return frozenset(parts | set(config["model"]["parts"]))


def trains_pooling(config: Mapping[str, Any]) -> bool:
    """Whether an objective of a config reads what the image tower pools, and not its tokens alone."""
    return any(
        OBJECTIVES[entry["kind"]].across_rows or "image" in entry.get("modalities", ())
        for entry in config["objectives"].values()
    )


def reads_teacher(entries: Mapping[str, Any]) -> bool:
    """Whether one of these objectives (entries of `config.objectives`) reads a teacher."""
    return any(OBJECTIVES[entry["kind"]].teacher or entry.get("teacher_weight", 0.0) for entry in entries.values())
