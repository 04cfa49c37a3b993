"""LiT: a text tower that learns to read an image tower which is trained already, and frozen.

    python -m mmjax.main --config=configs/lit_b.py:init=runs/siglip_b
    python -m mmjax.main --config=configs/lit_b.py:quickstart,init=runs/quickstart
    python -m mmjax.main --config=configs/lit_b.py:smoke

The recipe is "LiT: Zero-Shot Transfer with Locked-image text Tuning" (Zhai et al. 2022, section 3): the image tower
has no projection and no gradient, and the text tower a projection to its width. With a ViT-B/16 trained on
ImageNet-21k, and 60,000 steps on the public CC12M and YFCC100M, it reaches 73.9 % zero-shot ImageNet accuracy
(LiT-B16B_2 in the authors' big_vision, README_lit.md).

`init` is the run or the pretrained model that the image tower comes from, whose image encoder has to be the same:
`runs/siglip_b` if it is not given, and `runs/quickstart` with `quickstart`. `smoke` freezes a random tower unless it
is given one: it shows that the recipe runs, and learns next to nothing.

Set `--config.streams.train.source` to your own pairs. The embedded OpenMoji data, which it trains on otherwise, is
far too little for a model of this size: `quickstart` is the same on towers that fit it, and `smoke` 4 steps of that.
"""

from mmjax import config as configs
from mmjax import recipes

TOWERS = {"full": "runs/siglip_b", "quickstart": "runs/quickstart", "smoke": ""}


def get_config(arg=None):
    """`arg`: None, "quickstart" or "smoke", and "init=WORKDIR"."""
    size, options = recipes.parse("lit_b", arg, options=("init",))
    config = recipes.start(size)
    config.objectives.contrastive = configs.objective(kind="softmax")
    config.model.encoders.image.projection = False
    config.init_from.image = configs.init_from(source=options.get("init", TOWERS[size]), parts=("image/",))
    config.optimizer.rules = (("^image/", None, 1.0),)
    if size == "full":
        _as_published(config)
    return recipes.shortened(config) if size == "smoke" else config


def _as_published(config):
    config.model.encoders.text.length = 16
    stream = config.streams.train
    stream.batch_size = 16_384
    stream.preprocess.mirror = 0.5
    stream.preprocess.rand_augment_layers = 2
    stream.preprocess.rand_augment_magnitude = 10
    config.optimizer.weight_decay = 0.01
    config.optimizer.b2 = 0.999
    config.optimizer.warmup = 1800.0
    config.train.steps = 60_000
