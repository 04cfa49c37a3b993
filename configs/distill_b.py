"""A ViT-B/16 that learns from the pairs and from a larger model: softmax loss and two kinds of distillation.

    python -m mmjax.main --config=configs/distill_b.py:teacher=runs/large
    python -m mmjax.main --config=configs/distill_b.py:quickstart,teacher=runs/quickstart
    python -m mmjax.main --config=configs/distill_b.py:smoke

The student's embeddings are to point where the teacher's do, and its similarities of images and texts to follow the
teacher's, as in "CLIP-KD: An Empirical Study of CLIP Model Distillation" (Yang et al. 2024). There a ViT-B/16 reaches
57.5 % zero-shot ImageNet accuracy on CC3M and CC12M, and 37.0 % without a teacher (abstract); the teacher is a
ViT-L/14 trained on LAION-400M. The batch, the schedule and the weights follow the paper's programs; its third loss,
which compares the student's images with the teacher's texts and the other way round, is not here.

`teacher` is the workdir of a run with the same tokenizer and embeddings of the same width (`model.embed_dim`, 768
here and 128 with `quickstart`): `runs/siglip_b` if it is not given, and `runs/quickstart` with `quickstart`. `smoke`
takes the run's own moving average, so that it needs no other run.

Set `--config.streams.train.source` to your own pairs. The embedded OpenMoji data, which it trains on otherwise, is
far too little for a model of this size: `quickstart` has the same objectives on towers that fit it, and `smoke` is 4
steps of that.
"""

from mmjax import config as configs
from mmjax import recipes

TEACHERS = {"full": "runs/siglip_b", "quickstart": "runs/quickstart", "smoke": "ema"}


def get_config(arg=None):
    """`arg`: None, "quickstart" or "smoke", and "teacher=WORKDIR"."""
    size, options = recipes.parse("distill_b", arg, options=("teacher",))
    config = recipes.start(size)
    config.objectives.contrastive = configs.objective(kind="softmax")
    # The paper's 2000 times the mean squared error is about this many times 1 - cosine.
    config.objectives.features = configs.objective(
        kind="feature_distillation", weight=8.0, modalities=("image", "text")
    )
    config.objectives.similarities = configs.objective(kind="similarity_distillation")
    config.teacher.source = options.get("teacher", TEACHERS[size])
    if config.teacher.source == "ema":
        config.train.ema_decay = 0.99
    if size == "full":
        _as_published(config)
    return recipes.shortened(config) if size == "smoke" else config


def _as_published(config):
    config.streams.train.batch_size = 1024
    config.streams.train.preprocess.crop_min_area = 0.9
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    config.train.steps = 402_000
