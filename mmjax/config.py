"""The configuration tree: its defaults and its parts. `mmjax.validation` checks it.

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
    "distributed",
    "health.max_skipped_in_a_row",
    "health.rollbacks",
    "health.hang_timeout_seconds",
)
# Where the data lie: their fingerprints decide whether they are the same. How many texts are compared at a time.
_PLACE_OR_CHUNK = re.compile(r"streams\.[^.]+\.(mixture\.[^.]+\.)?(source|root)|objectives\.[^.]+\.chunk")


def default() -> ConfigDict:
    """The tree that every recipe starts from, with nothing to train yet."""
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "encoders": {},
                "embed_dim": 512,
                "logit_scale": 10.0,
                "logit_bias": -10.0,
                "max_logit_scale": 100.0,
                "fusion": {},
                "decoder": {},
                "classifier": {},
                "image_tokens": {},
                "speech": {},
                "parts": (),
            },
            "objectives": {},
            "teacher": {"source": "", "step": 0},
            "init_from": {},
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
            "health": {
                "max_skipped_in_a_row": 10,
                "spike_zscore": 0.0,
                "rollbacks": 0,
                "hang_timeout_seconds": 1800.0,
            },
            "distributed": {
                "coordinator_address": "",
                "num_processes": 0,
                "process_id": -1,
                "heartbeat_timeout_seconds": 100,
            },
            "loader": {"threads": 2, "workers": 0, "prefetch": 4, "max_broken_fraction": 0.05},
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
        "token_drop": 0.0,
        "norm": "pre",
        "norm_epsilon": 1e-6,
        "activation": "gelu_tanh",
        "final_norm": True,
        "key_bias": True,
        "layer_scale": 0.0,
        "gated": False,
        "embed_norm": False,
        "pool_norm": False,
        "pool_dense": False,
        "projection_bias": False,
    }
    return ConfigDict(shared | fields)


def image_encoder(**fields) -> ConfigDict:
    """A vision Transformer. `width`, `depth`, `mlp_dim` and `heads` of 0 are those of `variant`."""
    own = {
        "image_size": 224,
        "resize": "squash",
        "resample": "bicubic",
        "crop_fraction": 1.0,
        "max_patches": 0,
        "position": "learned",
        "position_size": 0,
        "position_interpolation": "antialiased",
        "relative_position": "",
        "pooling": "map",
        "class_token": False,
        "mask_token": False,
        "queries": 0,
        "query_width": 0,
        "query_heads": 0,
        "query_norm": "output",
        "patch_bias": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return _encoder(**{"variant": "B/16"} | own | fields)


def text_encoder(**fields) -> ConfigDict:
    """A text Transformer. `tokenizer` is a file; "" means the one that the data set comes with.

    Texts are cut off at `length` tokens; there are embeddings of so many `positions`, or 0: of as many.
    """
    own = {
        "vocab_size": 32_000,
        "length": 64,
        "positions": 0,
        "tokenizer": "",
        "pooling": "last",
        "causal": False,
        "mask_padding": False,
        "pad_id": 0,
        "end_id": 1,
        "class_token": False,
        "shifted_mask": False,
        "token_types": 0,
    }
    return _encoder(**own | fields)


def audio_encoder(**fields) -> ConfigDict:
    """A Transformer over the log-mel spectrogram of `seconds` of sound, `sample_rate` samples in each.

    A frame of the spectrogram is made of `fft` samples, the next begins `hop` samples later; `mels` is its height.
    """
    own = {"sample_rate": 16_000, "seconds": 30, "fft": 400, "hop": 160, "mels": 80, "pooling": "mean"}
    return _encoder(**own | fields)


_PART = {"width": 0, "mlp_dim": 0, "heads": 0, "remat": "none", "unroll": 1}


def fusion(**fields) -> ConfigDict:
    """Cross-attention from text to image, for matching and masked modelling. Sizes of 0 are those of the text tower.

    With `reads="tower"` and a `depth` of 0 it is the text tower's own layers that have it.
    """
    return ConfigDict(_PART | {"depth": 6, "reads": "text", "pooling": "mean"} | fields)


def decoder(**fields) -> ConfigDict:
    """A causal text decoder that reads the image, for captioning, or the tokens of another `modality`, such as speech.

    Sizes of 0 are those of the text tower. `start_id` is a token that is read in place of the first of a text, -1 for
    none. `max_new_tokens` is how many tokens it writes at most, unless it is told: 0 for as many as texts can have.
    """
    own = {
        "depth": 6,
        "modality": "image",
        "reads": "embedding",
        "image": "cross",
        "image_queries": 0,
        "query_heads": 0,
        "query_norm": "output",
        "image_class_token": True,
        "cross_mlp": False,
        "start": True,
        "start_id": -1,
        "max_new_tokens": 0,
        "tied": False,
        "transform": False,
        "head_bias": True,
    }
    return ConfigDict(_PART | own | fields)


def classifier(**fields) -> ConfigDict:
    """A linear layer from an image to classes of these `labels`."""
    return ConfigDict({"labels": (), "reads": "pooled"} | fields)


def image_tokens(**fields) -> ConfigDict:
    """A linear layer from each patch to a vocabulary of visual tokens."""
    return ConfigDict({"vocab_size": 8192} | fields)


def speech(**fields) -> ConfigDict:
    """How a decoder that reads speech is asked for a text: ids of tokens, -1 and () for none.

    A text begins with `start_id`; the language's id and that of the task, where the model knows several `languages` (by
    their codes, "en" say, in step with `language_ids`); and `prompt`. `suppress` and `suppress_first` are those of
    `mmjax.models.generate.Strategy`.
    """
    own = {
        "start_id": -1,
        "languages": (),
        "language_ids": (),
        "transcribe_id": -1,
        "translate_id": -1,
        "prompt": (),
        "suppress": (),
        "suppress_first": (),
    }
    return ConfigDict(own | fields)


def objective(**fields) -> ConfigDict:
    """A training objective: `kind` is a name in `mmjax.objectives`; each kind has options of its own."""
    shared = {"kind": "sigmoid", "weight": 1.0} | fields
    return ConfigDict(OBJECTIVES.get(shared["kind"], {}) | shared)


def _data(**fields) -> dict:
    """Where records come from: a source, a part of it, and which of its fields make up a record."""
    mapping = {"image": "", "captions": (), "label": ""}
    return {"source": "openmoji", "split": "train", "fields": mapping, "root": ""} | fields


def stream(**fields) -> ConfigDict:
    """A stream of training batches. Its `objectives` are names in `config.objectives`; () is all.

    `mixture` holds `component`s by name, in place of a source of its own (`source=""`). `inputs` says what its batches
    hold, and `captions_optional` that records without a caption are used too. `keep_decoded` keeps decoded images in
    memory: for small data sets.
    """
    own = {
        "mixture": {},
        "inputs": ("image", "text"),
        "captions_optional": False,
        "batch_size": 256,
        "weight": 1.0,
        "objectives": (),
        "keep_decoded": False,
        "preprocess": {
            "resize": "random_crop",
            "crop_min_area": 0.8,
            "crop_max_aspect": 1.0,
            "mirror": 0.5,
            "color_jitter": (0.0, 0.0, 0.0, 0.0),
            "color_jitter_probability": 0.8,
            "grayscale": 0.0,
            "rand_augment_layers": 0,
            "rand_augment_magnitude": 10,
            "captions": (),
            "caption_weights": (),
            "caption_choice": "random",
            "text_length": 0,
        },
    }
    return ConfigDict(_data() | own | fields)


def init_from(**fields) -> ConfigDict:
    """Parameters of another model that a new run starts from; `source` is what `mmjax.load` takes.

    `parts` are what the paths of the parameters start with, () for all. `allow` names what may be missing or differ
    there, and is then as this run makes it: starts of paths, and of settings ("model.encoders.image.pooling").
    """
    return ConfigDict({"source": "", "step": 0, "revision": "", "parts": (), "allow": ()} | fields)


def component(**fields) -> ConfigDict:
    """A source in a stream's mixture. A `weight` of 0 is its number of records; `upsampling` multiplies it."""
    return ConfigDict(_data() | {"weight": 0.0, "upsampling": 1.0} | fields)


def retrieval(**fields) -> ConfigDict:
    """Image-text retrieval. `gallery_split` widens the images that are searched beyond `split`.

    `match` says what a caption belongs to: "image", all records with the same image bytes, as in lists with a row for
    each caption; or "record", its own record alone, even where another one has the same image.
    """
    own = {
        "kind": "retrieval",
        "every": 0,
        "gallery_split": "",
        "match": "image",
        "captions": (),
        "batch_size": 256,
        "rerank": 0,
        "rerank_weight": 1.0,
        "contact_sheet": False,
    }
    return ConfigDict(_data(split="test") | own | fields)


def captions(**fields) -> ConfigDict:
    """Captions of held-out images beside their own; greedy where `beams` is 1."""
    own = {
        "kind": "captions",
        "every": 0,
        "captions": (),
        "batch_size": 256,
        "beams": 1,
        "length_penalty": 1.0,
        "contact_sheet": False,
    }
    return ConfigDict(_data(split="test") | own | fields)


def matching(**fields) -> ConfigDict:
    """Own and wrong captions of held-out images, told apart by the matching head.

    Wrong ones are drawn with `seed`; with `hard`, from the ten that the embeddings find most similar to the image.
    """
    own = {"kind": "matching", "every": 0, "captions": (), "batch_size": 256, "hard": False, "seed": 0}
    return ConfigDict(_data(split="test") | own | fields)


def compositional(**fields) -> ConfigDict:
    """Captions against swapped foils, or two images against two captions. `source` is a `.jsonl` or `.json` file.

    `by` says what is compared: "cosine" (of embeddings) or "matching" (what the matching head says). `root` is the
    folder of the images; "" is the file's.
    """
    own = {"kind": "compositional", "every": 0, "source": "", "root": "", "by": "cosine", "batch_size": 256}
    return ConfigDict(own | fields)


def zeroshot(**fields) -> ConfigDict:
    """Zero-shot classification. `classes` is a file with a class's name in each line, in the order of the labels; ""
    takes the captions as names. `templates` is a file with a sentence in each line, {} for the name; "" is a few.
    """
    own = {"calibration_bins": 15, "reliability_diagram": False, "confusion_matrix": False}
    return _zeroshot(**{"kind": "zeroshot"} | own | fields)


def robustness(**fields) -> ConfigDict:
    """Zero-shot classification of images that are blurred, noisy, compressed and grey. `seed` draws the noise."""
    return _zeroshot(**{"kind": "robustness", "seed": 0, "contact_sheet": False} | fields)


def _zeroshot(**fields) -> ConfigDict:
    own = {"every": 0, "classes": "", "templates": "", "captions": (), "batch_size": 256}
    return ConfigDict(_data(split="test") | own | fields)


def _labelled(**fields) -> ConfigDict:
    own = {"every": 0, "train_split": "train", "class_caption": "", "batch_size": 256}
    return ConfigDict(_data(split="test") | own | fields)


def linear_probe(**fields) -> ConfigDict:
    """Logistic regression on frozen image features; an `l2` of 0 is searched for on a part of `train_split`.

    In these three evaluators an image's class is its `label`, or its caption in the group `class_caption`.
    """
    return _labelled(**{"kind": "linear_probe", "l2": 0.0, "max_iterations": 1000, "calibration_bins": 15} | fields)


def knn(**fields) -> ConfigDict:
    """The class by a weighted vote of the `k` most similar images of `train_split`."""
    return _labelled(**{"kind": "knn", "k": 20, "temperature": 0.07} | fields)


def few_shot(**fields) -> ConfigDict:
    """Ridge regression on `shots` images of each class of `train_split`, drawn with `seeds` seeds."""
    return _labelled(**{"kind": "few_shot", "shots": (1, 5, 10, 25), "seeds": 3, "l2": 1024.0} | fields)


ENCODERS = {"image": image_encoder, "text": text_encoder, "audio": audio_encoder}
PARTS = {"fusion": fusion, "decoder": decoder}
HEADS = {
    "classifier": classifier,
    "image_tokens": image_tokens,
}  # what reads an image's tokens, and no objective trains
LABELLED = {"linear_probe": linear_probe, "knn": knn, "few_shot": few_shot}
EVALUATORS = {
    "retrieval": retrieval,
    "captions": captions,
    "matching": matching,
    "compositional": compositional,
    "zeroshot": zeroshot,
    "robustness": robustness,
    **LABELLED,
}
# The options of each kind of objective.
OBJECTIVES = {
    "sigmoid": {"chunk": 0},
    "softmax": {"chunk": 0},
    "matching": {},
    "captioning": {"parallel": 0.0, "label_smoothing": 0.0},
    "masked": {"probability": 0.15, "teacher_weight": 0.0},
    "feature_distillation": {"modalities": ("image",)},
    "similarity_distillation": {"temperature": 1.0, "chunk": 0},
}


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


def completed(saved: ConfigDict) -> ConfigDict:
    """A saved config with the keys that have come since, at the values that mean what there was before them."""
    config = default()
    config.update(saved)
    model = config.model
    for name, encoder in model.encoders.items():
        channels = {key: (encoder[key],) * 3 for key in ("mean", "std") if isinstance(encoder.get(key), float)}
        model.encoders[name] = ENCODERS[name](**encoder.to_dict() | channels)
    for name, make in (PARTS | HEADS).items():
        model[name] = make(**model[name].to_dict()) if model[name] else {}
    return config


def differing_keys(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys whose values differ and would change the result of a resumed run."""
    old, new = dict(flatten(saved)), dict(flatten(new))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    unimportant = tuple(f"{key}." for key in RESUMABLE_WITH_CHANGED)
    return [key for key in differing if not f"{key}.".startswith(unimportant) and not _PLACE_OR_CHUNK.fullmatch(key)]


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
