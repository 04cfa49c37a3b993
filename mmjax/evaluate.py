"""Evaluates a run's checkpoints, in a process of its own beside training or after it.

    python -m mmjax.evaluate --workdir=runs/quickstart
    python -m mmjax.evaluate --workdir=runs/quickstart --step=400
    python -m mmjax.evaluate --workdir=runs/quickstart --follow

It runs the evaluators of the run's own config and writes into WORKDIR/eval/: metrics.jsonl,
TensorBoard events and pictures. It reads the run and changes nothing in it. With --follow it
evaluates every new checkpoint until the run is finished; what it evaluated before, it skips.
Exit codes: 0 done, 2 a mistake in the flags, 130 stopped by Ctrl-C.
"""

import os
import sys
import time
from pathlib import Path

from absl import flags

from mmjax import cli
from mmjax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint; the latest by default")
_FOLLOW = flags.DEFINE_bool("follow", False, "wait for new checkpoints until the run is finished")
flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")

POLL_SECONDS = 2.0


def main() -> int:
    """Evaluates as the flags say; returns the exit code."""
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: the folder of the run")
    if _FOLLOW.value and _STEP.value is not None:
        raise UserError("--follow and --step exclude each other")
    from mmjax import runtime

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a trainer may be on the same device
    runtime.configure()
    from mmjax import api
    from mmjax.evaluators import Evaluation
    from mmjax.training import feedback
    from mmjax.training.checkpoint import saved_steps
    from mmjax.training.loop import RESULT

    workdir = Path(_WORKDIR.value)
    while _FOLLOW.value and not (workdir / "config.json").exists():
        time.sleep(POLL_SECONDS)  # the run may be about to start
    config = api.load_config(workdir)
    if not config.evaluators:
        raise UserError(f"the config of {workdir} has no evaluators")
    evaluation = Evaluation(config.evaluators)
    folder = workdir / "eval"
    done = {line["step"] for line in feedback.read_metrics(folder / "metrics.jsonl")}
    writer = feedback.MetricWriter(folder)

    def evaluate(model: api.Model) -> None:
        feedback.say(f"evaluating step {model.step} of {workdir}")
        metrics = evaluation.run([*config.evaluators], model, folder / "pictures")
        writer.write(model.step, metrics)
        feedback.show_evaluation(metrics)

    try:
        if not _FOLLOW.value:
            evaluate(api.load(workdir, _STEP.value))
            feedback.say(f"results: {folder}")
            return 0
        model = None
        while True:
            # Asked in this order: a finished run has written its last checkpoint before it says so.
            finished = (workdir / RESULT).exists()
            waiting = [step for step in saved_steps(workdir) if step not in done]
            for step in waiting:
                done.add(step)
                try:
                    loaded = api.load(workdir, step)
                except (OSError, ValueError):
                    if step in saved_steps(workdir):
                        raise
                    feedback.say(f"step {step} was removed before it could be read: skipped")
                    continue
                model = loaded if model is None else model.with_params(loaded.params, step)
                evaluate(model)
            if finished and not waiting:
                feedback.say(f"the run is finished; results: {folder}")
                return 0
            time.sleep(0 if waiting else POLL_SECONDS)
    finally:
        writer.close()


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
