"""tests/tiny.py with a decoder and a matching head."""

from mmjax import config as configs
from tests import tiny


def get_config(arg=None):
    config = tiny.get_config(arg or "4")
    part = {"width": 32, "heads": 8, "mlp_dim": 64, "depth": 1}
    config.model.fusion = configs.fusion(**part)
    config.model.decoder = configs.decoder(**part)
    config.objectives.matching = configs.objective(kind="matching")
    config.objectives.captioning = configs.objective(kind="captioning")
    config.train.checkpoint_every = 4
    return config
