"""Evaluators by name.

An evaluator is made from its entry in `config.evaluators`; `evaluate(model, picture)` yields
`(metric name, value)` and may draw a picture to that path. It reads the model only through
`mmjax.api.Model`. A new one is a file here and a line below.
"""

from collections.abc import Mapping
from pathlib import Path

from mmjax.api import Model
from mmjax.evaluators.retrieval import Retrieval

EVALUATORS = {"retrieval": Retrieval}


class Evaluation:
    """All evaluators of a config, their data opened on first use and kept."""

    def __init__(self, entries: Mapping):
        self._entries = entries
        self._made = {}

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
            if name not in self._made:
                self._made[name] = EVALUATORS[self._entries[name].kind](self._entries[name])
            picture = pictures / f"{name}-{model.step:08d}.png"
            for metric, value in self._made[name].evaluate(model, picture):
                metrics[f"eval/{name}/{metric}"] = value
        return metrics
