"""Trains a model: data, training, evaluation, checkpoints.

    python -m mmjax.main --config=configs/quickstart.py
    python -m mmjax.main --config=configs/vit_b.py:smoke --workdir=/tmp/vit_b --config.seed=1

`--config=FILE.py[:ARGUMENT]` is a recipe; `--config.KEY=VALUE` changes one of its settings (docs/configs.md).
The same command goes on with an unfinished run, exactly where its last checkpoint left it.
Exit codes: 0 finished, 2 a mistake in the settings, 75 hung (start it again), 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mmjax import cli
from mmjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe, FILE.py or FILE.py:ARGUMENT")
_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run; by default runs/RECIPE")
flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")


def main() -> int:
    """Trains as the flags say; returns the exit code."""
    if _CONFIG.value is None:
        raise UserError("--config is missing; for a start: --config=configs/quickstart.py")
    if "://" in (_WORKDIR.value or ""):
        raise UserError(f"--workdir={_WORKDIR.value}: only folders of a file system that is mounted here")
    from mmjax import runtime

    runtime.configure()  # before jax is imported, which waits until the flags are known to be right
    from mmjax.sharding import distributed
    from mmjax.training import loop

    distributed.initialize(_CONFIG.value.distributed)
    return loop.train(_CONFIG.value, Path(_WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename)))


def default_workdir(recipe: str) -> str:
    """ "configs/x.py:smoke" -> "runs/x-smoke"."""
    path, _, argument = recipe.partition(":")
    name = Path(path).stem + (f"-{argument}" if argument else "")
    return str(Path("runs") / "".join(c if c.isalnum() or c in "-_=,." else "-" for c in name))


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
