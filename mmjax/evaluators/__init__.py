"""Evaluators by name.

An evaluator is made from its entry in `config.evaluators`; `open(beat)` checks its data;
`evaluate(model, picture)` yields `(metric name, value)` and may draw a picture to that path. It reads the model only
through `mmjax.api.Model`. A new one is a file here and a line below.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from mmjax.api import Model
from mmjax.errors import UserError
from mmjax.evaluators.captions import Captions
from mmjax.evaluators.compositional import Compositional
from mmjax.evaluators.few_shot import FewShot
from mmjax.evaluators.knn import Knn
from mmjax.evaluators.linear_probe import LinearProbe
from mmjax.evaluators.matching import Matching
from mmjax.evaluators.retrieval import Retrieval
from mmjax.evaluators.robustness import Robustness
from mmjax.evaluators.zeroshot import ZeroShot

EVALUATORS = {
    "retrieval": Retrieval,
    "captions": Captions,
    "matching": Matching,
    "compositional": Compositional,
    "zeroshot": ZeroShot,
    "robustness": Robustness,
    "linear_probe": LinearProbe,
    "knn": Knn,
    "few_shot": FewShot,
}


class Evaluation:
    """All evaluators of a config, their data opened; `beat` is called for every record that is read for it.

    Raises:
      UserError: an evaluator's data will not do; the message names its key.
    """

    def __init__(self, entries: Mapping, beat: Callable[[], None] = lambda: None):
        self._entries = entries
        self._made = {name: EVALUATORS[entry.kind](entry) for name, entry in entries.items()}
        for name, evaluator in self._made.items():
            try:
                evaluator.open(beat)
            except UserError as error:
                raise UserError(f"config.evaluators.{name}: {error}") from error

    def due(self, step: int, last: bool) -> list[str]:
        """The evaluators that run at this step: every `every` steps, and all at the end."""
        return [name for name, entry in self._entries.items() if last or (entry.every and step % entry.every == 0)]

    def run(self, names: list[str], model: Model, pictures: Path) -> dict[str, float]:
        """Runs evaluators; returns {"eval/<evaluator>/<metric>": value}.

        Args:
          names: which.
          model: what to evaluate.
          pictures: the folder for pictures; their names carry the evaluator and the step.
        """
        metrics = {}
        for name in names:
            picture = pictures / f"{name}-{model.step:08d}.png" if jax.process_index() == 0 else None
            for metric, value in self._made[name].evaluate(model, picture):
                metrics[f"eval/{name}/{metric}"] = value
        return metrics
