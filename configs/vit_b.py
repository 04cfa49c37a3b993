"""SigLIP ViT-B/16 at 224 pixels with a B text tower, sigmoid loss.

    python -m mmjax.main --config=configs/vit_b.py
    python -m mmjax.main --config=configs/vit_b.py:smoke

The recipe is "Sigmoid Loss for Language Image Pre-Training" (Zhai et al. 2023, sections 3 and 4): t' = log 10,
b = -10, beta2 = 0.95, cosine schedule, weight decay on matrices only. On WebLI's 9 billion pairs it reaches 76.0 %
zero-shot ImageNet accuracy (table 1); with nothing else given it trains on the embedded OpenMoji data, which is far
too little for that. Set `--config.streams.train.source` for your own.
It runs unchanged on one GPU or on a TPU pod: the mesh fills itself with all devices. `smoke` is 4 steps of a tiny
batch, for a CPU.
"""

from mmjax import config as configs
from mmjax.errors import UserError


def get_config(arg=None):
    """`arg`: None or "smoke"."""
    if arg not in (None, "smoke"):
        raise UserError(f'configs/vit_b.py: unknown argument "{arg}"; known: smoke')
    config = configs.default()
    config.model.embed_dim = 768
    config.model.logit_scale = 10.0
    config.model.logit_bias = -10.0
    config.model.encoders.image = configs.image_encoder(variant="B/16", image_size=224, pooling="map", projection=False)
    config.model.encoders.text = configs.text_encoder(variant="B", vocab_size=32_000, length=64, pooling="last")
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    config.streams.train = configs.stream(source="openmoji:en", batch_size=1024)
    config.streams.train.preprocess.crop_min_area = 1.0
    config.streams.train.preprocess.mirror = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.b2 = 0.95
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 200.0
    config.train.steps = 2000
    config.evaluators.test = configs.retrieval(source="openmoji:en", match="record", every=500, contact_sheet=True)
    if arg == "smoke":
        config.streams.train.batch_size = 8
        config.optimizer.warmup = 1.0
        config.train.steps = 4
        config.train.log_every = 1
        config.train.checkpoint_every = 4
        config.evaluators = {}
    return config
