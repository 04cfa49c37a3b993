"""CLIP: ViT-B/16 at 224 pixels with a causal text tower of width 512, softmax loss.

    python -m mmjax.main --config=configs/clip_b.py
    python -m mmjax.main --config=configs/clip_b.py:quickstart
    python -m mmjax.main --config=configs/clip_b.py:smoke

The recipe is "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al. 2021, section 2
and appendix F): 32 epochs of 400 million pairs in batches of 32,768. It reaches 68.6 % zero-shot ImageNet accuracy
(table 11).

Set `--config.streams.train.source` to your own pairs, and with CLIP's own tokenizer
`--config.model.encoders.text.end_id=49407`. The embedded OpenMoji data, which it trains on otherwise, is
far too little for a model of this size: `quickstart` is the same loss on towers that fit it, and `smoke` 4 steps of
that.
"""

from mmjax import config as configs
from mmjax import recipes


def get_config(arg=None):
    """`arg`: None, "quickstart" or "smoke"."""
    size, _ = recipes.parse("clip_b", arg)
    config = recipes.start(size)
    config.objectives.contrastive = configs.objective(kind="softmax")
    if size == "full":
        _as_published(config)
    return recipes.shortened(config) if size == "smoke" else config


def _as_published(config):
    config.model.embed_dim = 512
    config.model.logit_scale = 1 / 0.07
    style = {"norm_epsilon": 1e-5, "activation": "quick_gelu"}
    config.model.encoders.image = configs.image_encoder(
        variant="B/16",
        image_size=224,
        resize="center_crop",
        pooling="cls",
        patch_bias=False,
        embed_norm=True,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        **style,
    )
    config.model.encoders.text = configs.text_encoder(
        variant="M", vocab_size=49_408, length=77, causal=True, pooling="eos", **style
    )
    config.streams.train.preprocess.crop_min_area = 0.9
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.2
    config.optimizer.b2 = 0.98
    config.optimizer.epsilon = 1e-6
    config.optimizer.warmup = 2000.0
    config.train.steps = 390_625
