"""What the recipes in configs/ share: their arguments, and the towers, data, optimizer and evaluators of each size.

A recipe adds its objectives to `start(size)`, and at full size what else its paper does differently.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError

SIZES = ("quickstart", "smoke")


class Arguments(NamedTuple):
    """`size` is "full", "quickstart" or "smoke"; `options` what was written as name=value."""

    size: str
    options: Mapping[str, str]


def parse(recipe: str, arg: str | None, options: Sequence[str] = ()) -> Arguments:
    """Reads a recipe's argument: a size, options, or both, as in "quickstart,teacher=runs/quickstart".

    Args:
      recipe: its name, for the message.
      arg: what stands after the colon of --config; None for the full size.
      options: the names that may be given a value.

    Raises:
      UserError: a part of `arg` is neither a size nor one of the options.
    """
    size, given = "full", {}
    for part in arg.split(",") if arg is not None else ():
        name, _, value = part.partition("=")
        if part in SIZES:
            size = part
        elif name in options and value:
            given[name] = value
        else:
            known = ", ".join([*SIZES, *(f"{name}=WORKDIR" for name in options)])
            raise UserError(f'configs/{recipe}.py: unknown argument "{part}"; known: {known}')
    return Arguments(size, given)


def start(size: str) -> ConfigDict:
    """A config without objectives: two towers, their data, and how they are trained and evaluated.

    "full" is SigLIP's ViT-B/16, "quickstart" the model of configs/quickstart.py; "smoke" is the same, and wants
    `shortened` in the end.
    """
    return _full() if size == "full" else _quickstart()


def _full() -> ConfigDict:
    config = configs.default()
    config.model.embed_dim = 768
    config.model.encoders.image = configs.image_encoder(variant="B/16", image_size=224, pooling="map", projection=False)
    config.model.encoders.text = configs.text_encoder(
        variant="B", vocab_size=32_000, length=64, pooling="last", projection_bias=True
    )
    config.streams.train = configs.stream(source="openmoji:en", batch_size=32_768)
    config.streams.train.preprocess.crop_min_area = 1.0
    config.streams.train.preprocess.mirror = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.b2 = 0.95
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 10_000.0
    config.train.steps = 275_000
    config.evaluators.test = configs.retrieval(source="openmoji:en", match="record", every=5000, contact_sheet=True)
    return config


def _quickstart() -> ConfigDict:
    config = configs.default()
    config.model.embed_dim = 128
    tower = {"variant": "Ti", "width": 128, "heads": 4, "mlp_dim": 512, "unroll": 0}
    config.model.encoders.image = configs.image_encoder(
        **tower | {"variant": "Ti/20"}, depth=3, image_size=60, pooling="mean"
    )
    config.model.encoders.text = configs.text_encoder(
        **tower, depth=2, length=12, vocab_size=4096, pooling="mean", mask_padding=True
    )
    config.streams.train = configs.stream(source="openmoji:en", batch_size=256, keep_decoded=True)
    # The held-out images are whole and upright: wider augmentation costs recall.
    config.streams.train.preprocess.crop_min_area = 0.9
    config.streams.train.preprocess.mirror = 0.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup = 60.0
    config.train.steps = 600
    config.train.checkpoint_every = 200
    config.evaluators.test = configs.retrieval(source="openmoji:en", match="record", every=300)
    config.evaluators.everything = configs.retrieval(
        source="openmoji:en", match="record", gallery_split="all", contact_sheet=True
    )
    return config


def shortened(config: ConfigDict, batch_size: int = 16) -> ConfigDict:
    """The same config, cut down to 4 small steps without an evaluation: does it run at all?"""
    for stream in config.streams.values():
        stream.batch_size = batch_size
    config.optimizer.warmup = 1.0
    config.train.steps = 4
    config.train.log_every = 1
    config.train.checkpoint_every = 4
    config.evaluators = {}
    return config
