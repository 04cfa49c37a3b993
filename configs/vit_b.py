"""SigLIP's ViT-B/16 (configs/siglip_b.py) in a short run: 2,000 steps of 1,024 pairs.

    python -m mmjax.main --config=configs/vit_b.py
    python -m mmjax.main --config=configs/vit_b.py:smoke

With nothing else given it trains on the embedded OpenMoji data, which is far too little for a model of this size. Set
`--config.streams.train.source` for your own. It runs unchanged on one GPU or on a TPU pod: the mesh fills itself with
all devices. `smoke` is 4 steps of a tiny batch, for a CPU.
"""

from mmjax import config as configs
from mmjax import recipes
from mmjax.errors import UserError


def get_config(arg=None):
    """`arg`: None or "smoke"."""
    if arg not in (None, "smoke"):
        raise UserError(f'configs/vit_b.py: unknown argument "{arg}"; known: smoke')
    config = recipes.start("full")
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    config.streams.train.batch_size = 1024
    config.optimizer.warmup = 200.0
    config.train.steps = 2000
    config.evaluators.test.every = 500
    return recipes.shortened(config, batch_size=8) if arg == "smoke" else config
