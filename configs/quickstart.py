"""Two small towers on OpenMoji: from nothing to a searchable model in minutes, on a laptop's CPU.

    python -m mmjax.main --config=configs/quickstart.py
    python -m mmjax.main --config=configs/quickstart.py:languages=all

docs/benchmarks.md has the figures. With `languages=all` every image comes with its name in one of 14
languages, another one each time; evaluation takes English names and, once more, all 14.
"""

from mmjax import config as configs
from mmjax import recipes
from mmjax.errors import UserError


def get_config(arg=None):
    """`arg`: None, "languages=en" or "languages=all"."""
    if arg not in (None, "languages=en", "languages=all"):
        raise UserError(f'configs/quickstart.py: unknown argument "{arg}"; known: languages=en, languages=all')
    config = recipes.start("quickstart")
    config.objectives.contrastive = configs.objective(kind="softmax")
    if arg == "languages=all":
        config.streams.train.source = "openmoji"
        config.model.encoders.text.vocab_size = 16_384
        config.model.encoders.text.length = 24
        config.evaluators.test_every_language = configs.retrieval(match="record")
    return config
