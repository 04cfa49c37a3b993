"""The configuration tree: its defaults, its parts, and the checks before anything is compiled.

A recipe's `get_config(arg=None)` starts from `default()` and adds encoders, objectives, streams and
evaluators with the functions below. `docs/configs.md` explains every key.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax.errors import UserError

SCHEDULES = ("cosine", "linear", "rsqrt", "constant")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
UNITS = ("steps", "examples", "epochs")
# A run may be resumed with other values of these: they change where and how fast it runs, and what
# it reports or keeps, but no parameter.
RESUMABLE_WITH_CHANGED = (
    "mesh",
    "loader",
    "evaluators",
    "train.log_every",
    "train.checkpoint_every",
    "train.max_to_keep",
    "train.best_metric",
    "train.best_mode",
)


def default() -> ConfigDict:
    """The tree that every recipe starts from, with nothing to train yet."""
    return ConfigDict(
        {
            "seed": 0,
            "model": {"encoders": {}, "embed_dim": 512, "logit_scale": 10.0, "logit_bias": -10.0},
            "objectives": {},
            "streams": {},
            "evaluators": {},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup": 0.0,
                "unit": "steps",
                "b1": 0.9,
                "b2": 0.95,
                "epsilon": 1e-8,
                "weight_decay": 1e-4,
                "grad_clip_norm": 1.0,
                "first_moment_dtype": "float32",
                "rules": (),
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "precision": {"params": "float32", "compute": "auto"},
            "train": {
                "steps": 0,
                "examples": 0,
                "epochs": 0.0,
                "microbatches": 1,
                "ema_decay": 0.0,
                "log_every": 50,
                "checkpoint_every": 1000,
                "max_to_keep": 2,
                "best_metric": "",
                "best_mode": "max",
            },
            "loader": {"threads": 2, "workers": 0, "prefetch": 4},
        }
    )


def _encoder(**fields) -> ConfigDict:
    shared = {
        "variant": "B",
        "width": 0,
        "depth": 0,
        "mlp_dim": 0,
        "heads": 0,
        "projection": True,
        "remat": "none",
        "unroll": 1,
    }
    return ConfigDict(shared | fields)


def image_encoder(**fields) -> ConfigDict:
    """A vision Transformer. `width`, `depth`, `mlp_dim` and `heads` of 0 are those of `variant`."""
    own = {"image_size": 224, "position": "learned", "pooling": "map", "mean": 0.5, "std": 0.5}
    return _encoder(**{"variant": "B/16"} | own | fields)


def text_encoder(**fields) -> ConfigDict:
    """A text Transformer. `tokenizer` is a file; "" means the one that the data set comes with."""
    own = {
        "vocab_size": 32_000,
        "length": 64,
        "tokenizer": "",
        "pooling": "last",
        "causal": False,
        "mask_padding": False,
    }
    return _encoder(**own | fields)


def objective(**fields) -> ConfigDict:
    """A training objective: `kind` is a name in `mmjax.objectives`."""
    return ConfigDict({"kind": "sigmoid", "weight": 1.0} | fields)


def stream(**fields) -> ConfigDict:
    """A stream of training batches. Its `objectives` are names in `config.objectives`; () is all.

    `keep_decoded` keeps decoded images in memory: for small data sets.
    """
    own = {
        "source": "openmoji",
        "split": "train",
        "batch_size": 256,
        "weight": 1.0,
        "objectives": (),
        "keep_decoded": False,
        "preprocess": {"crop_min_area": 0.8, "crop_max_aspect": 1.0, "mirror": 0.5, "languages": ("en",)},
    }
    return ConfigDict(own | fields)


def retrieval(**fields) -> ConfigDict:
    """Image-text retrieval. `gallery_split` widens the images that are searched beyond `split`."""
    own = {
        "kind": "retrieval",
        "every": 0,
        "source": "openmoji",
        "split": "test",
        "gallery_split": "",
        "languages": ("en",),
        "batch_size": 256,
        "contact_sheet": False,
    }
    return ConfigDict(own | fields)


ENCODERS = {"image": image_encoder, "text": text_encoder}
EVALUATORS = {"retrieval": retrieval}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for every leaf."""
    for key in config:
        value = config[key]
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """The tree as JSON keeps it: dictionaries, lists, strings, numbers."""
    return json.loads(config.to_json())


def from_plain(saved: Mapping[str, Any]) -> ConfigDict:
    """Rebuilds the config that `to_plain` saved."""

    def tuples(value):
        if isinstance(value, Mapping):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(tuples(saved))


def differing_keys(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys whose values differ and would change the result of a resumed run."""
    old, new = dict(flatten(saved)), dict(flatten(new))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [key for key in differing if not f"{key}.".startswith(tuple(f"{k}." for k in RESUMABLE_WITH_CHANGED))]


def suggest(name: str, known: Mapping | ConfigDict | tuple | list) -> str:
    """ "did you mean ...?" with the nearest name, or all the names that there are."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else f"known: {', '.join(names) or 'none'}"


def check_key(config: ConfigDict, dotted: str) -> None:
    """Raises UserError where `dotted` ("optimizer.learning_rate") is no key of the config."""
    node: Any = config
    for depth, part in enumerate(dotted.split(".")):
        if not isinstance(node, ConfigDict):
            raise UserError(f"config.{dotted}: config.{'.'.join(dotted.split('.')[:depth])} has no keys below it")
        if part not in node:
            raise UserError(f'unknown key config.{dotted}: no "{part}"; {suggest(part, node)}')
        node = node[part]


def validate(config: ConfigDict, device_count: int) -> None:
    """Checks everything that can be known before data is opened or anything compiled.

    Raises:
      UserError: one line that names the key, and the nearest valid one where that helps.
    """
    _check_structure(config)
    _check_names(config)
    _check_model(config)
    _check_training(config)
    _check_mesh(config, device_count)


def _check_structure(config: ConfigDict) -> None:
    template = default()
    for modality, encoder in config.model.encoders.items():
        _one_of(modality, ENCODERS, f"model.encoders.{modality}")
        template.model.encoders[modality] = ENCODERS[modality]()
        _check_like(encoder, template.model.encoders[modality], f"model.encoders.{modality}")
    for name, evaluator in config.evaluators.items():
        _one_of(evaluator.get("kind", "?"), EVALUATORS, f"evaluators.{name}.kind")
        template.evaluators[name] = EVALUATORS[evaluator.kind]()
    template.objectives = {name: objective() for name in config.objectives}
    template.streams = {name: stream() for name in config.streams}
    _check_like(config, template, "")


def _check_like(given: ConfigDict, template: ConfigDict, prefix: str) -> None:
    dot = f"{prefix}." if prefix else ""
    for key in given:
        if key not in template:
            raise UserError(f"unknown key config.{dot}{key}; {suggest(key, template)}")
        value, expected = given[key], template[key]
        if isinstance(expected, ConfigDict) and isinstance(value, ConfigDict):
            _check_like(value, expected, f"{dot}{key}")
        elif type(value) is not type(expected) and not (isinstance(expected, float) and type(value) is int):
            raise UserError(
                f"config.{dot}{key}: expected {type(expected).__name__}, got {type(value).__name__} {value!r}"
            )
    for key in template:
        if key not in given:
            raise UserError(f"missing key config.{dot}{key}")


def _check_names(config: ConfigDict) -> None:
    from mmjax.models.pooling import POOLINGS
    from mmjax.models.transformer import REMAT_POLICIES
    from mmjax.objectives import OBJECTIVES

    _one_of(config.optimizer.name, OPTIMIZERS, "optimizer.name")
    _one_of(config.optimizer.schedule, SCHEDULES, "optimizer.schedule")
    _one_of(config.optimizer.unit, UNITS, "optimizer.unit")
    _one_of(config.optimizer.first_moment_dtype, ("float32", "bfloat16"), "optimizer.first_moment_dtype")
    _one_of(config.precision.params, ("float32",), "precision.params")
    _one_of(config.precision.compute, ("auto", "float32", "bfloat16"), "precision.compute")
    _one_of(config.train.best_mode, ("max", "min"), "train.best_mode")
    for name, encoder in config.model.encoders.items():
        _one_of(encoder.pooling, POOLINGS, f"model.encoders.{name}.pooling")
        _one_of(encoder.remat, REMAT_POLICIES, f"model.encoders.{name}.remat")
        if name == "image":
            _one_of(encoder.position, ("learned", "sincos2d"), "model.encoders.image.position")
    for name, entry in config.objectives.items():
        _one_of(entry.kind, OBJECTIVES, f"objectives.{name}.kind")
    for name, entry in config.streams.items():
        for objective_name in entry.objectives:
            _one_of(objective_name, config.objectives, f"streams.{name}.objectives")


def _check_model(config: ConfigDict) -> None:
    from mmjax.models import variants
    from mmjax.models.multimodal import tower_size

    missing = {"image", "text"} - set(config.model.encoders)
    if missing:  # every objective and evaluator that there is compares the two
        raise UserError(f"missing key config.model.encoders.{sorted(missing)[0]}: contrastive training needs it")
    _at_least(config, "model.embed_dim", 1)
    if config.model.logit_scale <= 0:
        raise UserError(f"config.model.logit_scale: {config.model.logit_scale} is not positive")
    for name, encoder in config.model.encoders.items():
        key = f"model.encoders.{name}"
        _at_least(config, f"{key}.unroll", 0)
        try:
            patch = variants.parse(encoder.variant)[1]
        except UserError as error:
            raise UserError(f"config.{key}.variant: {error}") from None
        size = tower_size(encoder)
        if min(size) < 1 or size.width % size.heads:
            raise UserError(f"config.{key}.heads: {size.heads} heads do not divide width {size.width}")
        if name == "image":
            if not patch:
                raise UserError(f'config.{key}.variant: "{encoder.variant}" names no patch size; write it like B/16')
            if encoder.image_size < 1 or encoder.image_size % patch:
                raise UserError(f"config.{key}.image_size: patch {patch} does not divide {encoder.image_size} pixels")
            if encoder.position == "sincos2d" and size.width % 4:
                raise UserError(f"config.{key}.width: sincos2d positions need a multiple of 4, not {size.width}")
        elif encoder.length < 2:
            raise UserError(f"config.{key}.length: {encoder.length} is too short for a token and its end")
        if not encoder.projection and size.width != config.model.embed_dim:
            raise UserError(
                f"config.{key}.projection: without one, width {size.width} must equal model.embed_dim "
                f"{config.model.embed_dim}"
            )


def _check_training(config: ConfigDict) -> None:
    for part in ("objectives", "streams"):
        if not config[part]:
            raise UserError(f"config.{part} is empty: there is nothing to train")
    lengths = {unit: config.train[unit] for unit in UNITS if config.train[unit]}
    if len(lengths) != 1 or min(lengths.values()) < 0:
        raise UserError(f"config.train: set exactly one of {', '.join(UNITS)} to a positive number, not {lengths}")
    for key in ("train.microbatches", "train.log_every", "train.checkpoint_every", "train.max_to_keep"):
        _at_least(config, key, 1)
    for key in ("optimizer.learning_rate", "optimizer.warmup", "optimizer.weight_decay", "optimizer.grad_clip_norm"):
        _at_least(config, key, 0)
    for key, low in (("loader.threads", 1), ("loader.workers", 0), ("loader.prefetch", 1)):
        _at_least(config, key, low)
    if not 0 <= config.train.ema_decay < 1:
        raise UserError(f"config.train.ema_decay: {config.train.ema_decay} is not in [0, 1)")
    _at_least(config, "seed", 0)
    for key in ("b1", "b2"):
        if not 0 <= config.optimizer[key] < 1:
            raise UserError(f"config.optimizer.{key}: {config.optimizer[key]} is not in [0, 1)")
    best = config.train.best_metric.split("/")
    if best != [""] and (len(best) != 3 or best[0] != "eval" or best[1] not in config.evaluators):
        raise UserError(
            f'config.train.best_metric: "{config.train.best_metric}" is not eval/EVALUATOR/METRIC; '
            f"evaluators: {', '.join(config.evaluators) or 'none'}"
        )
    for name in config.evaluators:
        _at_least(config, f"evaluators.{name}.every", 0)
        _at_least(config, f"evaluators.{name}.batch_size", 1)
    for name, entry in config.streams.items():
        _at_least(config, f"streams.{name}.batch_size", 1)
        if not entry.preprocess.languages:
            raise UserError(f"config.streams.{name}.preprocess.languages: name at least one")
        if not 0 <= entry.preprocess.mirror <= 1:
            raise UserError(f"config.streams.{name}.preprocess.mirror: {entry.preprocess.mirror} is not in [0, 1]")
        if entry.weight <= 0:
            raise UserError(f"config.streams.{name}.weight: {entry.weight} is not positive")
        if not 0 < entry.preprocess.crop_min_area <= 1:
            raise UserError(f"config.streams.{name}.preprocess.crop_min_area: not in (0, 1]")
        if entry.preprocess.crop_max_aspect < 1:
            raise UserError(f"config.streams.{name}.preprocess.crop_max_aspect: less than 1")
    for rule in config.optimizer.rules:
        try:
            pattern, learning_rate, weight_decay = rule
            re.compile(pattern)
            float(weight_decay), float(learning_rate or 0)
        except (TypeError, ValueError, re.error) as error:
            raise UserError(
                f"config.optimizer.rules: {rule!r} is not (pattern, learning-rate multiplier or None, "
                f"weight-decay multiplier): {error}"
            ) from None


def _check_mesh(config: ConfigDict, device_count: int) -> None:
    from mmjax.models.multimodal import tower_size
    from mmjax.sharding.mesh import mesh_shape

    data, fsdp, tensor = mesh_shape((config.mesh.data, config.mesh.fsdp, config.mesh.tensor), device_count)
    rows = data * fsdp
    for name, entry in config.streams.items():
        if entry.batch_size % (rows * config.train.microbatches):
            raise UserError(
                f"config.streams.{name}.batch_size: {entry.batch_size} is not divisible by mesh.data {data} x "
                f"mesh.fsdp {fsdp} x train.microbatches {config.train.microbatches}"
            )
    for name, entry in config.evaluators.items():
        if entry.batch_size % rows:
            raise UserError(
                f"config.evaluators.{name}.batch_size: {entry.batch_size} is not divisible by mesh.data {data} x "
                f"mesh.fsdp {fsdp}"
            )
    for name, encoder in config.model.encoders.items():
        size = tower_size(encoder)
        split = {"heads": (size.heads, "tensor", tensor), "mlp_dim": (size.mlp_dim, "tensor", tensor)}
        split["width"] = (size.width, "fsdp", fsdp)
        if name == "text":
            split["vocab_size"] = (encoder.vocab_size, "tensor", tensor)
        for key, (value, axis, count) in split.items():
            if value % count:
                raise UserError(f"config.model.encoders.{name}.{key}: {value} is not divisible by mesh.{axis} {count}")


def _one_of(value: str, known: Mapping | ConfigDict | tuple, key: str) -> None:
    if value not in known:
        raise UserError(f'config.{key}: unknown "{value}"; {suggest(value, known)}')


def _at_least(config: ConfigDict, key: str, low: float) -> None:
    node: Any = config
    for part in key.split("."):
        node = node[part]
    if node < low:
        raise UserError(f"config.{key}: {node} is less than {low}")
