"""The checks of a config before data is opened or anything compiled."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax.config import (
    ENCODERS,
    EVALUATORS,
    HEADS,
    LABELLED,
    OBJECTIVES,
    PARTS,
    UNITS,
    component,
    default,
    init_from,
    objective,
    speech,
    stream,
    suggest,
)
from mmjax.errors import UserError

SCHEDULES = ("cosine", "linear", "rsqrt", "constant")
# What tuples hold.
_NAMES = ("captions", "allow", "inputs", "labels", "languages", "modalities", "objectives", "parts")
_ELEMENTS = dict.fromkeys(_NAMES, str) | {"caption_weights": (int, float), "color_jitter": (int, float), "shots": int}
_ELEMENTS |= {"mean": (int, float), "std": (int, float)}
_ELEMENTS |= dict.fromkeys(("language_ids", "prompt", "suppress", "suppress_first"), int)
_ELEMENTS_NAMED = {key: "names" if kind is str else "numbers" for key, kind in _ELEMENTS.items()}
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
# Of evaluators' options.
LOWEST = {"every": 0, "batch_size": 1, "rerank": 0, "rerank_weight": 0, "beams": 1, "seed": 0}
LOWEST |= {"l2": 0, "max_iterations": 1, "k": 1, "seeds": 1, "calibration_bins": 1}


def validate(config: ConfigDict, device_count: int) -> None:
    """Checks everything that can be known before data is opened or anything compiled.

    Raises:
      UserError: one line that names the key, and the nearest valid one where that helps.
    """
    _check_structure(config)
    _check_names(config)
    _check_model(config)
    _check_training(config)
    _check_objectives(config)
    check_evaluators(config)
    _check_mesh(config, device_count)


def _check_structure(config: ConfigDict) -> None:
    template = default()
    for modality, encoder in config.model.encoders.items():
        _one_of(modality, ENCODERS, f"model.encoders.{modality}")
        template.model.encoders[modality] = ENCODERS[modality]()
        _check_like(encoder, template.model.encoders[modality], f"model.encoders.{modality}")
    for part, make in (PARTS | HEADS).items():
        if config.model.get(part):
            template.model[part] = make()
    if config.model.get("speech"):
        template.model.speech = speech()
    template.evaluators = config.evaluators  # see check_evaluators
    template.init_from = {name: init_from() for name in config.init_from}
    for name, entry in config.objectives.items():
        _one_of(entry.get("kind", "?"), OBJECTIVES, f"objectives.{name}.kind")
        template.objectives[name] = objective(kind=entry.kind)
    template.streams = {name: stream() for name in config.streams}
    for name, entry in config.streams.items():
        if isinstance(entry.get("mixture"), ConfigDict):
            template.streams[name].mixture = {part: component() for part in entry.mixture}
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
        elif key in _ELEMENTS and not all(isinstance(item, _ELEMENTS[key]) for item in value):
            raise UserError(f"config.{dot}{key}: {value!r} holds something else than {_ELEMENTS_NAMED[key]}")
    for key in template:
        if key not in given:
            raise UserError(f"missing key config.{dot}{key}")


def _check_names(config: ConfigDict) -> None:
    from mmjax.data.augment import RESIZES
    from mmjax.data.image import FOR_EVALUATION, RESAMPLES
    from mmjax.data.pipeline import CAPTION_CHOICES
    from mmjax.models import decoder, fusion
    from mmjax.models.pooling import POOLINGS
    from mmjax.models.position import INTERPOLATIONS, POSITIONS, RELATIVE_POSITIONS
    from mmjax.models.transformer import ACTIVATIONS, NORMS, REMAT_POLICIES

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
        _one_of(encoder.norm, NORMS, f"model.encoders.{name}.norm")
        _one_of(encoder.activation, ACTIVATIONS, f"model.encoders.{name}.activation")
        if name == "image":
            _one_of(encoder.position, POSITIONS, "model.encoders.image.position")
            _one_of(encoder.position_interpolation, INTERPOLATIONS, "model.encoders.image.position_interpolation")
            _one_of(encoder.relative_position, RELATIVE_POSITIONS, "model.encoders.image.relative_position")
            _one_of(encoder.resize, FOR_EVALUATION, "model.encoders.image.resize")
            _one_of(encoder.resample, RESAMPLES, "model.encoders.image.resample")
    for name in PARTS:
        if part := config.model[name]:
            _one_of(part.remat, REMAT_POLICIES, f"model.{name}.remat")
            reads = {"fusion": fusion.READS, "decoder": decoder.READS}[name]
            _one_of(part.reads, reads, f"model.{name}.reads")
    if config.model.fusion:
        _one_of(config.model.fusion.pooling, POOLINGS, "model.fusion.pooling")
    if config.model.decoder:
        _one_of(config.model.decoder.image, decoder.IMAGE_INPUTS, "model.decoder.image")
    for name, entry in config.streams.items():
        for objective_name in entry.objectives:
            _one_of(objective_name, config.objectives, f"streams.{name}.objectives")
        _one_of(entry.preprocess.resize, RESIZES, f"streams.{name}.preprocess.resize")
        _one_of(entry.preprocess.caption_choice, CAPTION_CHOICES, f"streams.{name}.preprocess.caption_choice")


def _check_model(config: ConfigDict) -> None:
    from mmjax.models import variants
    from mmjax.models.multimodal import output_width, tower_size

    missing = {"image", "text"} - set(config.model.encoders)
    if missing:
        raise UserError(f"missing key config.model.encoders.{sorted(missing)[0]}: it also says how its input is read")
    _at_least(config, "model.embed_dim", 1)
    if config.model.logit_scale <= 0:
        raise UserError(f"config.model.logit_scale: {config.model.logit_scale} is not positive")
    _at_least(config, "model.max_logit_scale", 0)
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
        if not 0 <= encoder.token_drop < 1:
            raise UserError(f"config.{key}.token_drop: {encoder.token_drop} is not in [0, 1)")
        if name == "image":
            _check_image_encoder(encoder, size, patch, key)
        elif name == "audio":
            for field in ("sample_rate", "seconds", "fft", "hop", "mels"):
                _at_least(config, f"{key}.{field}", 1)
            if encoder.pooling == "eos":
                raise UserError(f"config.{key}.pooling: a recording has no end token; choose another one than eos")
        elif encoder.length < 2:
            raise UserError(f"config.{key}.length: {encoder.length} is too short for a token and its end")
        elif encoder.class_token and encoder.pooling != "last":
            raise UserError(f"config.{key}.class_token: it stands after the text: pooling has to be last")
        elif encoder.shifted_mask and not (encoder.class_token and encoder.mask_padding):
            raise UserError(f"config.{key}.shifted_mask: it needs class_token and mask_padding")
        elif encoder.positions and encoder.positions < encoder.length:
            raise UserError(f"config.{key}.positions: {encoder.positions} are fewer than the length {encoder.length}")
        elif encoder.token_drop and encoder.pooling == "eos":
            raise UserError(f"config.{key}.token_drop: the end token, which is pooled, could be dropped")
        if not encoder.projection and output_width(encoder) != config.model.embed_dim:
            raise UserError(
                f"config.{key}.projection: without one, width {output_width(encoder)} must equal model.embed_dim "
                f"{config.model.embed_dim}"
            )
    for name in PARTS:
        if config.model[name]:
            _check_part(config, name)
    _check_heads(config)


def _check_heads(config: ConfigDict) -> None:
    from mmjax.models.multimodal import CLASSIFIER_READS, has_class_token
    from mmjax.models.multimodal import PARTS as BUILT

    for part in config.model.parts:
        _one_of(part, BUILT, "model.parts")
        if part in HEADS and not config.model[part]:
            raise UserError(f"config.model.parts: {part} needs config.model.{part}; mmjax.config.{part}() makes one")
    if head := config.model.classifier:
        _one_of(head.reads, CLASSIFIER_READS, "model.classifier.reads")
        if not head.labels:
            raise UserError("config.model.classifier.labels: there is none")
        if head.reads == "class_and_mean" and not has_class_token(config.model.encoders.image):
            raise UserError("config.model.classifier.reads: there is no class token; set encoders.image.class_token")
    if config.model.image_tokens:
        _at_least(config, "model.image_tokens.vocab_size", 1)


def _check_image_encoder(encoder: ConfigDict, size: Any, patch: int, key: str) -> None:
    if not patch:
        raise UserError(f'config.{key}.variant: "{encoder.variant}" names no patch size; write it like B/16')
    for field, low in (("image_size", 1), ("position_size", 0)):
        if encoder[field] < low or encoder[field] % patch:
            raise UserError(f"config.{key}.{field}: patch {patch} does not divide {encoder[field]} pixels")
    if encoder.max_patches:
        raise UserError(f"config.{key}.max_patches: images of any shape cannot be trained on; set it to 0")
    if encoder.position == "sincos2d" and size.width % 4:
        raise UserError(f"config.{key}.width: sincos2d positions need a multiple of 4, not {size.width}")
    if len(encoder.mean) != 3 or len(encoder.std) != 3 or min(encoder.std) <= 0:
        raise UserError(f"config.{key}.mean, .std: three numbers each, one a channel; deviations are positive")
    if not 0 < encoder.crop_fraction <= 1:
        raise UserError(f"config.{key}.crop_fraction: {encoder.crop_fraction} is not in (0, 1]")
    if encoder.pooling == "eos":
        raise UserError(f"config.{key}.pooling: an image has no end token; choose another one than eos")
    _check_queries(encoder, "queries", size, key)
    if encoder.query_width and not encoder.queries:
        raise UserError(f"config.{key}.query_width: it needs queries")
    if encoder.pooling == "map" and encoder.query_width not in (0, size.width):
        raise UserError(f"config.{key}.query_width: pooling map needs the tower's own, {size.width}")
    if encoder.relative_position and encoder.token_drop:
        raise UserError(f"config.{key}.token_drop: relative positions are between all tokens")


def _check_queries(settings: Mapping[str, Any], count: str, size: Any, key: str) -> None:
    from mmjax.models.pooling import QUERY_NORMS

    _one_of(settings["query_norm"], QUERY_NORMS, f"{key}.query_norm")
    for field in (count, "query_heads"):
        if settings[field] < 0:
            raise UserError(f"config.{key}.{field}: {settings[field]} is less than 0")
    width, heads = settings.get("query_width", 0) or size.width, settings["query_heads"] or size.heads
    if width < 1 or width % heads:
        raise UserError(f"config.{key}.query_heads: {heads} heads do not divide width {width}")


def _check_part(config: ConfigDict, name: str) -> None:
    from mmjax.models.multimodal import part_size, tower_size

    text = config.model.encoders.text
    part, width = part_size(config.model[name].to_dict(), tower_size(text)), tower_size(text).width
    if part["reads"] == "tower" and part["depth"]:
        raise UserError(f"config.model.{name}.depth: with reads=tower the layers are the text tower's; set it to 0")
    for key, low in (
        ("depth", int(part["reads"] != "tower")),
        ("width", 1),
        ("heads", 1),
        ("mlp_dim", 1),
        ("unroll", 0),
    ):
        if part[key] < low:
            raise UserError(f"config.model.{name}.{key}: {part[key]} is less than {low}")
    if part["width"] % part["heads"]:
        raise UserError(f"config.model.{name}.heads: {part['heads']} heads do not divide width {part['width']}")
    if part["width"] != width and (name == "fusion" or part["reads"] == "text"):
        raise UserError(
            f"config.model.{name}.width: {part['width']} is not the text tower's {width}, whose tokens it reads"
        )
    if name == "fusion":
        if part["pooling"] == "eos" and not (text.mask_padding or text.pooling == "eos"):
            raise UserError("config.model.fusion.pooling: eos needs encoders.text.mask_padding, or its pooling eos")
        return
    _check_queries(part, "image_queries", ConfigDict(part), "model.decoder")
    if part["cross_mlp"] and part["image"] != "cross":
        raise UserError("config.model.decoder.cross_mlp: it needs image=cross")
    if part["reads"] == "text" and not text.causal:
        raise UserError("config.model.decoder.reads: the text tower's tokens see the future: set encoders.text.causal")
    if part["start_id"] >= 0 and (part["start"] or part["reads"] == "text"):
        raise UserError("config.model.decoder.start_id: it needs reads=embedding, and start off")
    if not -1 <= part["start_id"] < text.vocab_size:
        raise UserError(f"config.model.decoder.start_id: {part['start_id']} is no id of the vocabulary")
    if part["max_new_tokens"] < 0:
        raise UserError(f"config.model.decoder.max_new_tokens: {part['max_new_tokens']} is less than 0")
    if part["modality"] != "image":
        raise UserError(f"config.model.decoder.modality: no objective trains a decoder that reads {part['modality']}")
    if part["tied"] and part["reads"] == "text":
        raise UserError("config.model.decoder.tied: only an embedding of its own can be tied (reads=embedding)")


def _check_objectives(config: ConfigDict) -> None:
    """Everything that an objective needs is there."""
    from mmjax.objectives import inputs_of, parts_of, parts_read, reads_teacher

    for name, entry in config.objectives.items():
        for part in PARTS:
            if part in parts_read(entry, config.model) and not config.model[part]:
                raise UserError(
                    f"config.objectives.{name}: {entry.kind} needs config.model.{part}, which is empty; "
                    f"mmjax.config.{part}() makes one"
                )
        for key in ("label_smoothing", "parallel", "probability", "teacher_weight"):
            if key in entry:
                _share(entry[key], f"objectives.{name}.{key}")
        for modality in entry.get("modalities", ()):
            _one_of(modality, ENCODERS, f"objectives.{name}.modalities")
        if "temperature" in entry:
            _positive(entry.temperature, f"objectives.{name}.temperature")
        if entry.get("parallel") and (config.model.decoder.reads != "embedding" or not config.model.decoder.start):
            raise UserError(f"config.objectives.{name}.parallel: it needs model.decoder with reads=embedding and start")
    for name, entry in config.streams.items():
        for objective_name in entry.objectives or config.objectives:
            missing = {*inputs_of(config.objectives[objective_name])} - {*entry.inputs}
            if missing:
                raise UserError(
                    f"config.streams.{name}.objectives: {objective_name} needs {sorted(missing)[0]}, not among the "
                    "stream's inputs"
                )
    fed = {name for entry in config.streams.values() for name in entry.objectives or config.objectives}
    if unused := sorted({*config.objectives} - fed):
        raise UserError(f"config.objectives.{unused[0]}: no stream trains it; name it in a stream's objectives")
    parts, text = parts_of(config), config.model.encoders.text
    kinds = {entry.kind: name for name, entry in config.objectives.items()}
    if "matching" in kinds and not _has_embeddings(config):
        raise UserError(
            f"config.objectives.{kinds['matching']}: it draws wrong pairs by similarities of embeddings, which "
            "nothing trains; add softmax or sigmoid, or take towers over with init_from"
        )
    readers = {"masked", "matching"} & parts or (config.model.decoder and config.model.decoder.reads == "text")
    if text.token_drop and (text.pooling == "last" or ("text" in parts and readers)):
        raise UserError("config.model.encoders.text.token_drop: something reads the tokens by their places")
    source = config.teacher.source
    if reads_teacher(config.objectives) and not source:
        raise UserError('config.teacher.source: an objective reads a teacher; set a run\'s workdir, or "ema"')
    if source == "ema" and not config.train.ema_decay:
        raise UserError("config.teacher.source: ema needs config.train.ema_decay")


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
    for key in ("spike_zscore", "rollbacks", "hang_timeout_seconds"):
        _at_least(config, f"health.{key}", 0)
    _at_least(config, "health.max_skipped_in_a_row", 1)
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
    _share(config.loader.max_broken_fraction, "loader.max_broken_fraction")
    for name, entry in config.objectives.items():
        if "chunk" in entry:
            _at_least(config, f"objectives.{name}.chunk", 0)
    for name in config.streams:
        _check_stream(config, name)
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


def check_evaluators(config: ConfigDict) -> None:
    """Checks the evaluators of a config, and that its model has what they need.

    Raises:
      UserError: as `validate`.
    """
    from mmjax.objectives import parts_of

    parts = parts_of(config)
    for name, entry in config.evaluators.items():
        key = f"evaluators.{name}"
        _one_of(entry.get("kind", "?"), EVALUATORS, f"{key}.kind")
        _check_like(entry, EVALUATORS[entry.kind](), key)
        labelled = entry.kind in LABELLED
        needed = {"image"} if labelled else {"image", "decoder"} if entry.kind == "captions" else {"image", "text"}
        if entry.kind == "matching" or entry.get("rerank") or entry.get("by") == "matching":
            needed.add("matching")
        if missing := sorted(needed - parts):
            raise UserError(f"config.{key}: no objective trains what it needs: {missing[0]}")
        if labelled and config.model.encoders.image.pooling == "map" and not _has_embeddings(config):
            raise UserError(
                f'config.model.encoders.image.pooling: {key} reads "map", which no objective trains; use "mean"'
            )
        compares = (
            entry.kind in ("retrieval", "zeroshot", "robustness") or entry.get("by") == "cosine" or entry.get("hard")
        )
        if compares and not _has_embeddings(config):
            raise UserError(f"config.{key}: it compares embeddings, which no objective trains")
        for option, low in LOWEST.items():
            if option in entry:
                _at_least(config, f"{key}.{option}", low)
        _check_options(entry, key)


def _has_embeddings(config: ConfigDict) -> bool:
    """Whether what the image tower pools means something: an objective trains it, or it is taken over."""
    from mmjax.objectives import trains_pooling

    return trains_pooling(config) or any(entry.source for entry in config.init_from.values())


def _check_options(entry: ConfigDict, key: str) -> None:
    if "match" in entry:
        _one_of(entry.match, ("image", "record"), f"{key}.match")
    if "by" in entry:
        _one_of(entry.by, ("cosine", "matching"), f"{key}.by")
    if "temperature" in entry:
        _positive(entry.temperature, f"{key}.temperature")
    if "shots" in entry:
        _positive(entry.l2, f"{key}.l2")
        shots = entry.shots
        if not shots or shots[0] < 1 or any(more <= fewer for fewer, more in itertools.pairwise(shots)):
            raise UserError(f"config.{key}.shots: {shots} are no ascending numbers of at least 1")


def _check_stream(config: ConfigDict, name: str) -> None:
    from mmjax.data.pipeline import INPUTS

    entry, key = config.streams[name], f"streams.{name}"
    _at_least(config, f"{key}.batch_size", 1)
    _positive(entry.weight, f"{key}.weight")
    if bool(entry.mixture) == bool(entry.source):
        raise UserError(f'config.{key}: set either source or mixture; with a mixture, source is ""')
    weights = [part.weight > 0 for part in entry.mixture.values()]
    if any(weights) and not all(weights):
        raise UserError(f"config.{key}.mixture: give every component a weight, or none (then sizes decide)")
    for part_name, part in entry.mixture.items():
        _at_least(config, f"{key}.mixture.{part_name}.weight", 0)
        _positive(part.upsampling, f"{key}.mixture.{part_name}.upsampling")
    for modality in entry.inputs:
        _one_of(modality, INPUTS, f"{key}.inputs")
    if not entry.inputs or len(set(entry.inputs)) < len(entry.inputs):
        raise UserError(f"config.{key}.inputs: {entry.inputs} is not one or both of {', '.join(INPUTS)}, each once")
    if entry.captions_optional and set(entry.inputs) != {*INPUTS}:
        raise UserError(f"config.{key}.captions_optional: captions can be missing only where inputs has image and text")
    preprocess, key = entry.preprocess, f"{key}.preprocess"
    for share in ("mirror", "color_jitter_probability", "grayscale"):
        _share(preprocess[share], f"{key}.{share}")
    if not 0 < preprocess.crop_min_area <= 1:
        raise UserError(f"config.{key}.crop_min_area: not in (0, 1]")
    if preprocess.crop_max_aspect < 1:
        raise UserError(f"config.{key}.crop_max_aspect: less than 1")
    jitter = preprocess.color_jitter
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        raise UserError(
            f"config.{key}.color_jitter: {jitter} is not (brightness, contrast, saturation, hue), hue at most 0.5"
        )
    _at_least(config, f"{key}.rand_augment_layers", 0)
    if not 0 <= preprocess.rand_augment_magnitude <= 30:
        raise UserError(f"config.{key}.rand_augment_magnitude: not in 0 to 30")
    weights = preprocess.caption_weights
    if weights and (len(weights) != len(preprocess.captions) or min(weights) < 0 or sum(weights) <= 0):
        raise UserError(f"config.{key}.caption_weights: one for each of captions, none negative, not all 0")
    if weights and preprocess.caption_choice != "random":
        raise UserError(f"config.{key}.caption_weights: only caption_choice random has a use for them")
    if "text" not in entry.inputs:
        return
    longest = config.model.encoders.text.length
    if not (preprocess.text_length == 0 or 2 <= preprocess.text_length <= longest):
        raise UserError(
            f"config.{key}.text_length: {preprocess.text_length} is neither 0 nor between 2 and "
            f"model.encoders.text.length {longest}"
        )


def _check_mesh(config: ConfigDict, device_count: int) -> None:
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
    check_divides(config.model, fsdp, tensor)


def check_divides(model: ConfigDict, fsdp: int, tensor: int) -> None:
    """Checks that a mesh with axes of these sizes divides a model's parameters.

    Raises:
      UserError: it does not; the message names the size.
    """
    from mmjax.models.multimodal import output_width, part_size, tower_size

    for name, encoder in model.encoders.items():
        size = tower_size(encoder)
        split = {"heads": (size.heads, "tensor", tensor), "mlp_dim": (size.mlp_dim, "tensor", tensor)}
        split["width"] = (size.width, "fsdp", fsdp)
        if name == "image" and encoder.queries:
            split["query_width"] = (output_width(encoder), "fsdp", fsdp)
            split["query_heads"] = (encoder.query_heads or size.heads, "tensor", tensor)
        if name == "text":
            split["vocab_size"] = (encoder.vocab_size, "tensor", tensor)
        _check_divides(split, f"model.encoders.{name}")
    if model.image_tokens:
        _check_divides({"vocab_size": (model.image_tokens.vocab_size, "tensor", tensor)}, "model.image_tokens")
    for name in PARTS:
        if model[name]:
            part = part_size(model[name].to_dict(), tower_size(model.encoders.text))
            split = {"heads": (part["heads"], "tensor", tensor), "mlp_dim": (part["mlp_dim"], "tensor", tensor)}
            _check_divides(split | {"width": (part["width"], "fsdp", fsdp)}, f"model.{name}")


def _check_divides(split: Mapping[str, tuple[int, str, int]], key: str) -> None:
    for name, (value, axis, count) in split.items():
        if value % count:
            raise UserError(f"config.{key}.{name}: {value} is not divisible by mesh.{axis} {count}")


def _one_of(value: str, known: Mapping | ConfigDict | tuple, key: str) -> None:
    if value not in known:
        raise UserError(f'config.{key}: unknown "{value}"; {suggest(value, known)}')


def _share(value: float, key: str) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"config.{key}: {value} is not in [0, 1]")


def _positive(value: float, key: str) -> None:
    if value <= 0:
        raise UserError(f"config.{key}: {value} is not positive")


def _at_least(config: ConfigDict, key: str, low: float) -> None:
    node: Any = config
    for part in key.split("."):
        node = node[part]
    if node < low:
        raise UserError(f"config.{key}: {node} is less than {low}")
