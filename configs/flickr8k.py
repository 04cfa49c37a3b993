"""Two small towers from scratch on Flickr8k's 6,000 photographs with five captions each: half an hour on two cores.

    python -m mmjax.main --config=configs/flickr8k.py
    python -m mmjax.main --config=configs/flickr8k.py:data=/data/flickr8k

The folder (`../shared/data` by default) holds two WebDataset tars, `flickr8k_train.tar` and `flickr8k_dev.tar`: a
`.jpg` and a `.json` with a list `captions` for each photograph. The data set is for research alone and does not come
with mmjax. docs/benchmarks.md has the figures. So few pairs are far too little for a good model: this shows the path
that any WebDataset takes, and what the pairs give by themselves.
"""

from mmjax import config as configs
from mmjax.errors import UserError


def get_config(arg=None):
    """`arg`: None, "data=FOLDER" or "smoke"."""
    name, _, folder = (arg or "").partition("=")
    if arg not in (None, "smoke") and not (name == "data" and folder):
        raise UserError(f'configs/flickr8k.py: unknown argument "{arg}"; known: data=FOLDER, smoke')
    tar = f"webdataset:{folder or '../shared/data'}/flickr8k_{{split}}.tar"
    config = configs.default()
    config.model.embed_dim = 192
    config.model.encoders.image = configs.image_encoder(
        variant="Ti/16", width=192, depth=6, heads=6, mlp_dim=768, image_size=80, pooling="mean", unroll=0
    )
    config.model.encoders.text = configs.text_encoder(
        variant="Ti",
        width=192,
        depth=3,
        heads=6,
        mlp_dim=768,
        length=24,
        vocab_size=4096,
        pooling="mean",
        mask_padding=True,
        unroll=0,
    )
    config.objectives.contrastive = configs.objective(kind="softmax")
    config.streams.train = configs.stream(source=tar, split="train", batch_size=256, keep_decoded=True)
    preprocess = config.streams.train.preprocess
    preprocess.resize = "inception_crop"
    preprocess.crop_min_area = 0.5
    preprocess.crop_max_aspect = 4 / 3
    preprocess.color_jitter = (0.3, 0.3, 0.3, 0.05)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.2
    config.optimizer.warmup = 100.0
    config.train.steps = 1300
    config.train.checkpoint_every = 650
    config.evaluators.dev = configs.retrieval(source=tar, split="dev", every=650, contact_sheet=True)
    if arg == "smoke":
        config.train.steps = 4
        config.train.log_every = 1
        config.optimizer.warmup = 1.0
        config.streams.train.batch_size = 16
    return config
