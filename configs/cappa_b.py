"""CapPa: an image tower trained by captioning alone, most of the time with all tokens predicted at once.

    python -m mmjax.main --config=configs/cappa_b.py
    python -m mmjax.main --config=configs/cappa_b.py:quickstart
    python -m mmjax.main --config=configs/cappa_b.py:smoke

The recipe is "Image Captioners Are Scalable Vision Learners Too" (Tschannen et al. 2023, section 3.1) with the sizes
and the schedule that its authors published in big_vision: ViT-B/16 at 224 pixels, a decoder of 6 layers, and three
quarters of the captions predicted from the image alone. There is no text tower: `model.encoders.text` says how
captions are read, and how wide the decoder is. What the paper measures is the image tower, frozen, with a head of its
own (table 1); here `captions` counts how many held-out images are captioned exactly.

Set `--config.streams.train.source` to your own pairs. The embedded OpenMoji data, which it trains on otherwise, is
far too little for a model of this size: `quickstart` has the same objective on a tower that fits it, and `smoke` is 4
steps of that.
"""

from mmjax import config as configs
from mmjax import recipes


def get_config(arg=None):
    """`arg`: None, "quickstart" or "smoke"."""
    size, _ = recipes.parse("cappa_b", arg)
    config = recipes.start(size)
    config.objectives.captioning = configs.objective(kind="captioning", parallel=0.75)
    # Nothing trains a pooling or a projection.
    config.model.encoders.image.pooling = "mean"
    config.model.encoders.image.projection = False
    config.model.decoder = configs.decoder(depth=2, unroll=0)
    config.evaluators = {"captions": configs.captions(source="openmoji:en", contact_sheet=True)}
    if size == "full":
        _as_published(config)
    return recipes.shortened(config) if size == "smoke" else config


def _as_published(config):
    config.model.decoder = configs.decoder(depth=6)
    config.streams.train.batch_size = 8192
    config.optimizer.name = "adafactor"
    config.train.steps = 366_500
    config.evaluators.captions.every = 5000
