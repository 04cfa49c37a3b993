"""Evaluates a run's checkpoints, in a process of its own beside training or after it, or any model.

    python -m mmjax.evaluate --workdir=runs/quickstart
    python -m mmjax.evaluate --workdir=runs/quickstart --step=400
    python -m mmjax.evaluate --workdir=runs/quickstart --follow
    python -m mmjax.evaluate --workdir=runs/quickstart --all --evaluators=configs/quickstart.py:languages=all
    python -m mmjax.evaluate --init=runs/quickstart/checkpoints/400 --evaluators=configs/quickstart.py --out=found
    python -m mmjax.evaluate --workdir=runs/quickstart,runs/other --report

It runs the evaluators of the run's own config, or those of another recipe, and writes into WORKDIR/eval/:
metrics.jsonl, TensorBoard events and pictures. It writes nothing else. With --all it evaluates
every checkpoint that is there, with --follow also every new one until the run is finished; what an evaluator has
reported of a checkpoint before, it does not repeat. Where `train.best_metric` is set, the trainer keeps the
checkpoint that is best by what was found here. With --init it evaluates whatever `mmjax.load` loads, and writes
into the folder --out alone. On several hosts, start it in every process, as `mmjax.main`.
With --report it evaluates nothing: it explains some held-out pairs by the last checkpoint (WORKDIR/eval/explanations),
and shows what is in the workdirs in one HTML page, which needs no other file, in eval/ of the first of them or in
--out.
Exit codes: 0 done, 2 a mistake in the flags, 130 stopped by Ctrl-C.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mmjax import cli
from mmjax import config as configs
from mmjax.errors import RecordError, UserError, one_line

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run; with --report of several, A,B,C")
_INIT = flags.DEFINE_string("init", None, "a model in place of a run: whatever `mmjax.load` loads")
_OUT = flags.DEFINE_string("out", None, "with --init, the folder for what is found; with --report, for the page")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; the latest by default")
_ALL = flags.DEFINE_bool("all", False, "every checkpoint that is there, where it was not evaluated before")
_FOLLOW = flags.DEFINE_bool("follow", False, "the same, and wait for new checkpoints until the run is finished")
_EVALUATORS = flags.DEFINE_string("evaluators", None, "take those of this recipe, FILE.py or FILE.py:ARGUMENT")
_REPORT = flags.DEFINE_bool("report", False, "evaluate nothing: write a page that shows what is in the workdirs")
flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")

POLL_SECONDS = 2.0
EXCLUSIVE = [("init", other) for other in ("workdir", "all", "follow")]
EXCLUSIVE += [("all", "step"), ("follow", "step")]
EXCLUSIVE += [("report", other) for other in ("init", "step", "all", "follow", "evaluators")]


def main() -> int:
    """Evaluates as the flags say; returns the exit code."""
    several = _FOLLOW.value or _ALL.value
    all_flags = (_WORKDIR, _INIT, _STEP, _ALL, _FOLLOW, _EVALUATORS, _REPORT)
    given = [flag.name for flag in all_flags if flag.value not in (None, False)]
    for one, other in EXCLUSIVE:
        if one in given and other in given:
            raise UserError(f"--{one} and --{other} exclude each other")
    if _WORKDIR.value is None and _INIT.value is None:
        raise UserError("--workdir is missing: the folder of the run (or --init: a model)")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a trainer may be on the same device
    if _REPORT.value:
        return _report()
    if (_INIT.value is None) != (_OUT.value is None):
        raise UserError("--init=MODEL goes with --out=FOLDER, for what is found")
    from mmjax import runtime

    runtime.configure()
    from mmjax import api
    from mmjax.sharding import distributed
    from mmjax.training import feedback

    model_of = _INIT.value or _WORKDIR.value
    while _FOLLOW.value and not (Path(model_of) / "config.json").exists():
        time.sleep(POLL_SECONDS)  # the run may be about to start
    config = api.load_config(model_of)
    distributed.initialize(config.distributed)
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else None
    model = None if several else api.load(model_of, _STEP.value)
    with Findings(config, workdir / "eval" if workdir else Path(_OUT.value), workdir) as findings:
        if several:
            _evaluate_all(workdir, findings)
        else:
            findings.add(model, findings.names)
        feedback.say(f"results: {findings.folder}")
    return 0


def _report() -> int:
    """Writes the page of the workdirs, and for it explanations of some held-out pairs."""
    names = _WORKDIR.value
    workdirs = [Path(name) for name in ([names] if Path(names).is_dir() else names.split(",")) if name]
    if not workdirs:
        raise UserError("--workdir names no folder")
    from mmjax import report, runtime

    runs = report.read_runs(workdirs)  # what is no run is told before anything is computed
    runtime.configure()
    from mmjax import explain

    for run in runs:
        try:
            explain.save_of_run(run.path)
        except (UserError, RecordError, OSError, ValueError) as error:
            run.note("explanations", f"none were made: {one_line(error)}")
    print(f"report: {report.write(runs, Path(_OUT.value or workdirs[0] / 'eval'))}")
    return 0


def _evaluate_all(workdir: Path, findings: "Findings") -> None:
    """Evaluates every checkpoint that was not yet, and with --follow those to come until the run is finished."""
    from mmjax import api
    from mmjax.sharding import distributed
    from mmjax.training import feedback
    from mmjax.training.checkpoint import saved_steps
    from mmjax.training.loop import RESULT

    model = None
    while True:
        # Asked in this order: a finished run has written its last checkpoint before it says so.
        finished = not _FOLLOW.value or (workdir / RESULT).exists()
        waiting = [(step, findings.missing(step)) for step in saved_steps(workdir)]
        finished, waiting = distributed.from_first_process((finished, [part for part in waiting if part[1]]))
        for step, names in waiting:
            try:
                loaded = api.load(workdir, step)
            except (OSError, ValueError):
                if step in saved_steps(workdir):
                    raise
                feedback.say(f"step {step} was removed before it could be read: skipped")
                continue
            model = loaded if model is None else model.with_params(loaded.params, step)
            findings.add(model, names)
        if finished and not waiting:
            feedback.say(f"{'the run is finished; ' if _FOLLOW.value else ''}nothing is left to evaluate")
            return
        time.sleep(0 if waiting else POLL_SECONDS)


class Findings:
    """What evaluators found in a model, or in a run's checkpoints.

    Raises:
      UserError: the evaluators will not do.
    """

    def __init__(self, config: ConfigDict, folder: Path, workdir: Path | None):
        """`config` is the model's; what is found goes into `folder`. `workdir` is None where the model is of no run."""
        from mmjax.evaluators import Evaluation
        from mmjax.training import feedback
        from mmjax.validation import check_evaluators

        self.folder, self._workdir, self._config = folder, workdir, config
        own = _whole(config.evaluators)
        if _EVALUATORS.value:
            config.evaluators = cli.load_recipe(_EVALUATORS.value, "evaluators").evaluators
        config.evaluators = entries = _whole(config.evaluators)
        check_evaluators(config)
        self.names = [*entries]
        if not self.names:
            raise UserError(f"the config of {_EVALUATORS.value or workdir or _INIT.value} has no evaluators")
        for name in self.names if workdir else ():  # what was found before is known by their names
            if name in own and configs.to_plain(own[name]) != configs.to_plain(entries[name]):
                raise UserError(f"evaluators.{name} of {_EVALUATORS.value} is another one than the run's: rename it")
        self._evaluation = Evaluation(entries)
        self._lines = feedback.read_metrics(self.folder / "metrics.jsonl")
        self._writer = feedback.MetricWriter(self.folder)

    def __enter__(self) -> "Findings":
        return self

    def __exit__(self, *exception) -> None:
        self._writer.close()

    def missing(self, step: int) -> list[str]:
        """The evaluators that have reported nothing of this checkpoint yet."""
        known = {name.split("/")[1] for line in self._lines if line["step"] == step for name in line if "/" in name}
        return [name for name in self.names if name not in known]

    def add(self, model: Any, names: list[str]) -> None:
        """Evaluates a model; writes and shows what is found, and marks the checkpoint that is the best so far."""
        import jax

        from mmjax.training import feedback
        from mmjax.training.checkpoint import mark_best

        feedback.say(f"evaluating step {model.step} of {self._workdir or _INIT.value}")
        metrics = self._evaluation.run(names, model, self.folder / "pictures")
        self._writer.write(model.step, metrics)
        self._lines.append({"step": model.step, **metrics})
        feedback.show_evaluation(metrics)
        if self._workdir and jax.process_index() == 0:
            mark_best(self._workdir, self._config, self._lines)


def _whole(entries: Mapping[str, ConfigDict]) -> ConfigDict:
    """Evaluators with the defaults of options that their run did not know yet; when they run is of no matter here."""
    known = {
        name: configs.EVALUATORS[entry.kind](**entry) if entry.get("kind") in configs.EVALUATORS else entry
        for name, entry in entries.items()
    }
    return ConfigDict({name: {**entry, "every": 0} for name, entry in known.items()})


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
