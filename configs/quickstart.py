"""Two small towers on OpenMoji: from nothing to a searchable model in minutes, on a laptop's CPU.

    python -m mmjax.main --config=configs/quickstart.py
    python -m mmjax.main --config=configs/quickstart.py:languages=all

docs/benchmarks.md has the figures. With `languages=all` every image comes with its name in one of 14
languages, another one each time; evaluation takes English names and, once more, all 14.
"""

from mmjax import config as configs
from mmjax.errors import UserError


def get_config(arg=None):
    """`arg`: None, "languages=en" or "languages=all"."""
    if arg not in (None, "languages=en", "languages=all"):
        raise UserError(f'configs/quickstart.py: unknown argument "{arg}"; known: languages=en, languages=all')
    every_language = arg == "languages=all"
    config = configs.default()
    config.model.embed_dim = 128
    tower = {"variant": "Ti", "width": 128, "heads": 4, "mlp_dim": 512, "unroll": 0}
    config.model.encoders.image = configs.image_encoder(
        **tower | {"variant": "Ti/20"}, depth=3, image_size=60, pooling="mean"
    )
    config.model.encoders.text = configs.text_encoder(
        **tower, depth=2, length=12, vocab_size=4096, pooling="mean", mask_padding=True
    )
    config.objectives.contrastive = configs.objective(kind="softmax")
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
    if every_language:
        config.streams.train.source = "openmoji"
        config.model.encoders.text.vocab_size = 16_384
        config.model.encoders.text.length = 24
        config.evaluators.test_every_language = configs.retrieval(match="record")
    return config
