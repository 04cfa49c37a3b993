"""Fine-tuning of a pretrained image-text model on pairs of your own.

    python -m mmjax.main --config=configs/finetune.py:google/siglip-base-patch16-224 --config.streams.train.source=...

The argument is what `mmjax.load` takes: a name on the hub, a Hugging Face or open_clip folder, or a run's workdir. The
model, its tokenizer, how it reads images, and its loss (sigmoid or softmax) are as they were pretrained. The rest are
choices made here that hold for most: a learning rate a hundredth of pretraining's, little augmentation, ten epochs.
"""

from mmjax import api
from mmjax import config as configs
from mmjax.errors import UserError


def get_config(arg=None):
    """`arg`: the model to start from."""
    if not arg:
        raise UserError("configs/finetune.py: name the model to start from, as in configs/finetune.py:FOLDER")
    pretrained, config = api.load_config(arg), configs.default()
    config.model = pretrained.model
    config.objectives = pretrained.objectives
    config.init_from.pretrained = configs.init_from(source=arg)
    config.streams.train = configs.stream(source="openmoji:en", batch_size=256)
    config.streams.train.preprocess.crop_min_area = 0.9
    config.streams.train.preprocess.mirror = 0.0
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup = 100.0
    config.train.epochs = 10.0
    config.evaluators.test = configs.retrieval(source="openmoji:en", match="record")
    return config
