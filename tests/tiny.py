"""A recipe small enough for tests: two one-layer towers on OpenMoji.

--config=tests/tiny.py
"""

from mmjax import config as configs


def get_config(arg=None):
    """`arg`: the number of steps, 8 by default."""
    config = configs.default()
    config.model.embed_dim = 16
    tower = {"variant": "Ti", "width": 32, "heads": 8, "mlp_dim": 64}
    config.model.encoders.image = configs.image_encoder(
        **tower | {"variant": "Ti/14"}, depth=2, image_size=28, pooling="map"
    )
    config.model.encoders.text = configs.text_encoder(
        **tower, depth=2, length=8, vocab_size=4096, pooling="mean", mask_padding=True
    )
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    config.streams.train = configs.stream(source="openmoji:en", batch_size=16)
    config.optimizer.warmup = 2.0
    config.train.steps = int(arg or 8)
    config.train.log_every = 1
    config.train.checkpoint_every = 2
    config.evaluators.test = configs.retrieval(source="openmoji:en", match="record", batch_size=80)
    return config
