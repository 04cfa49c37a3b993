"""CoCa: one model that compares images with texts and captions images. Softmax loss and captioning loss together.

    python -m mmjax.main --config=configs/coca_b.py
    python -m mmjax.main --config=configs/coca_b.py:quickstart
    python -m mmjax.main --config=configs/coca_b.py:smoke

The recipe is CoCa-Base of "CoCa: Contrastive Captioners are Image-Text Foundation Models" (Yu et al. 2022, sections 3
and 4.1): 288 pixels in patches of 18, pooled by 256 queries for the decoder, whose outputs one more query pools for the
embedding ("cascade"); 12 causal text layers with a class token after the text, which the contrastive loss reads, and 12
more, with cross-attention to the image, that predict the next token; captioning weighs twice as much. The paper's
largest model, of 2.1 billion parameters, reaches 86.3 % zero-shot ImageNet accuracy (abstract); it was trained on 3
billion labelled images and 1.8 billion pairs.

Set `--config.streams.train.source` to your own pairs. The embedded OpenMoji data, which it trains on otherwise, is
far too little for a model of this size: `quickstart` has the same objectives on towers that fit it, which are pooled as
the other recipes' are (an image beside the decoder's 8 queries, a text at its last position), and `smoke` is 4 steps of
that.
"""

from mmjax import config as configs
from mmjax import recipes


def get_config(arg=None):
    """`arg`: None, "quickstart" or "smoke"."""
    size, _ = recipes.parse("coca_b", arg)
    config = recipes.start(size)
    config.objectives.contrastive = configs.objective(kind="softmax", weight=1.0)
    config.objectives.captioning = configs.objective(kind="captioning", weight=2.0)
    config.model.encoders.text.causal = True
    config.model.decoder = configs.decoder(depth=2, reads="text", image_queries=8, unroll=0)
    config.evaluators.captions = configs.captions(source="openmoji:en", contact_sheet=True)
    if size == "full":
        _as_published(config)
    return recipes.shortened(config) if size == "smoke" else config


def _as_published(config):
    config.model.logit_scale = 1 / 0.07
    config.model.encoders.image.variant = "B/18"
    config.model.encoders.image.image_size = 288
    config.model.encoders.text.vocab_size = 64_000
    config.model.encoders.image.update({"queries": 256, "pooling": "query"})
    config.model.encoders.text.update({"class_token": True, "mask_padding": True})
    config.model.decoder = configs.decoder(depth=12, reads="text")
    config.streams.train.batch_size = 65_536
    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 8e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "linear"
    config.train.steps = 500_000
