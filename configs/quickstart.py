"""Two small towers on OpenMoji: from nothing to a searchable model in minutes, on a laptop's CPU.

    python -m mmjax.main --config=configs/quickstart.py
    python -m mmjax.main --config=configs/quickstart.py:languages=all
    python -m mmjax.main --config=configs/quickstart.py:objectives=all

docs/benchmarks.md has the figures. With `languages=all` every image comes with its name in one of 14
languages, another one each time; evaluation takes English names and, once more, all 14. With `objectives=all` the same
towers also learn to caption images and to say whether a text belongs to an image, which re-ranks the retrieval.
"""

from mmjax import config as configs
from mmjax import recipes
from mmjax.errors import UserError


def get_config(arg=None):
    """`arg`: None, "languages=en", "languages=all" or "objectives=all"."""
    known = ("languages=en", "languages=all", "objectives=all")
    if arg not in (None, *known):
        raise UserError(f'configs/quickstart.py: unknown argument "{arg}"; known: {", ".join(known)}')
    config = recipes.start("quickstart")
    config.objectives.contrastive = configs.objective(kind="softmax")
    if arg == "languages=all":
        config.streams.train.source = "openmoji"
        config.model.encoders.text.vocab_size = 16_384
        config.model.encoders.text.length = 24
        config.evaluators.test_every_language = configs.retrieval(match="record")
    if arg == "objectives=all":
        # From the words themselves, not from the text tower: what the two find in a text then differs, and their sum is
        # better than either.
        config.model.fusion = configs.fusion(depth=2, reads="embedding", unroll=0)
        config.model.decoder = configs.decoder(depth=2, unroll=0)
        config.objectives.matching = configs.objective(kind="matching", weight=0.5)
        config.objectives.captioning = configs.objective(kind="captioning", weight=0.25)
        config.evaluators.test.rerank = 10
        config.evaluators.test.rerank_weight = 0.5
        config.evaluators.captions = configs.captions(source="openmoji:en", every=300, contact_sheet=True)
    return config
