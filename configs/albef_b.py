"""ALBEF: softmax loss, image-text matching and masked words, with the run's moving average as a teacher.

    python -m mmjax.main --config=configs/albef_b.py
    python -m mmjax.main --config=configs/albef_b.py:quickstart
    python -m mmjax.main --config=configs/albef_b.py:smoke

The recipe is "Align before Fuse" (Li et al. 2021, sections 3 and 4): ViT-B/16 at 256 pixels, 6 text layers, 6 layers
with cross-attention to the image, a moving average of 0.995 whose predictions are 0.4 of the labels, 30 epochs of 14
million pairs in batches of 512. Retrieval takes the 10 nearest and lets the matching head order them. Fine-tuned on
COCO, the paper's model finds 94.1 % of the texts and 82.8 % of the images of Flickr30K first, without having been
trained on it (table 3).

It differs from the paper in what it starts from and compares with. The paper starts from DeiT and the two halves of
BERT; here everything starts from random parameters, and so the layers are normalised before (`norm="pre"`), not after
as in BERT. There is no queue of 65,536 earlier embeddings: pairs are compared within the batch, so a larger one is
better than the paper's. The learning rate falls to 0, and the teacher's share is 0.4 from the first step.

Set `--config.streams.train.source` to your own pairs. The embedded OpenMoji data, which it trains on otherwise, is
far too little for a model of this size: `quickstart` has the same objectives on towers that fit it, and `smoke` is 4
steps of that.
"""

from mmjax import config as configs
from mmjax import recipes


def get_config(arg=None):
    """`arg`: None, "quickstart" or "smoke"."""
    size, _ = recipes.parse("albef_b", arg)
    config = recipes.start(size)
    config.objectives.contrastive = configs.objective(kind="softmax", weight=0.6)
    config.objectives.distillation = configs.objective(kind="similarity_distillation", weight=0.4)
    config.objectives.matching = configs.objective(kind="matching")
    config.objectives.masked = configs.objective(kind="masked", probability=0.15, teacher_weight=0.4)
    config.teacher.source = "ema"
    config.train.ema_decay = 0.995
    config.model.fusion = configs.fusion(depth=2, unroll=0)
    config.evaluators.test.rerank = 10
    if size == "full":
        _as_published(config)
    return recipes.shortened(config) if size == "smoke" else config


def _as_published(config):
    config.model.embed_dim = 256
    config.model.logit_scale = 1 / 0.07
    config.model.encoders.image = configs.image_encoder(variant="B/16", image_size=256, pooling="cls")
    config.model.encoders.text = configs.text_encoder(
        variant="B", depth=6, vocab_size=30_522, length=30, pooling="cls", mask_padding=True, activation="gelu"
    )
    config.model.fusion = configs.fusion(depth=6, pooling="cls")
    stream = config.streams.train
    stream.batch_size = 512
    stream.preprocess.resize = "inception_crop"
    stream.preprocess.crop_min_area = 0.2
    stream.preprocess.crop_max_aspect = 4 / 3
    stream.preprocess.mirror = 0.5
    stream.preprocess.rand_augment_layers = 2
    stream.preprocess.rand_augment_magnitude = 7
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.02
    config.optimizer.b2 = 0.999
    config.optimizer.warmup = 1000.0
    config.train.steps = 826_000
