"""SigLIP: ViT-B/16 at 224 pixels with a B text tower, sigmoid loss.

    python -m mmjax.main --config=configs/siglip_b.py
    python -m mmjax.main --config=configs/siglip_b.py:quickstart
    python -m mmjax.main --config=configs/siglip_b.py:smoke

The recipe is "Sigmoid Loss for Language Image Pre-Training" (Zhai et al. 2023, sections 3 and 4): t' = log 10, b =
-10, beta2 = 0.95, cosine schedule, batches of 32,768. Trained on WebLI, it reaches 76.2 % zero-shot ImageNet accuracy
("SigLIP 2", Tschannen et al. 2025, table 1). The optimizer (AdamW), the length (about 9 billion pairs) and the
warm-up are choices made here.

Set `--config.streams.train.source` to your own pairs. The embedded OpenMoji data, which it trains on otherwise, is
far too little for a model of this size: `quickstart` is the same loss on towers that fit it, and `smoke` 4 steps of
that.
"""

from mmjax import config as configs
from mmjax import recipes


def get_config(arg=None):
    """`arg`: None, "quickstart" or "smoke"."""
    size, _ = recipes.parse("siglip_b", arg)
    config = recipes.start(size)
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    return recipes.shortened(config) if size == "smoke" else config
