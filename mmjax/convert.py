"""Converts a model: from Hugging Face's or open_clip's layout to a workdir of mmjax, or back.

    python -m mmjax.convert google/siglip-base-patch16-224 runs/siglip
    python -m mmjax.convert runs/siglip exported/siglip
    python -m mmjax.convert runs/clip/checkpoints/2000 exported/clip --family=open_clip

FROM is what `mmjax.load` takes: a name on the hub, a folder, a run's workdir or one of its checkpoints. TO is a new
folder. A run becomes a folder of the family whose models have its architecture, anything else a workdir, unless
--family says which kind of folder it is to be.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from mmjax import cli
from mmjax.errors import UserError

_FAMILY = flags.DEFINE_string("family", "", "write a folder of this family, as in clip or open_clip")
_REVISION = flags.DEFINE_string("revision", "", "which version on the hub: a branch, tag or commit")
_STEP = flags.DEFINE_integer("step", 0, "which checkpoint of a run; 0 takes the latest")
_PICKLE = flags.DEFINE_bool("allow_pickle", False, "also read weights that are a pickle, with torch")
flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")


def main(arguments: list[str]) -> int:
    """Converts as the flags say; returns the exit code."""
    source, target = arguments[0], Path(arguments[1])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already, and not an empty folder")
    from mmjax import runtime

    runtime.configure()
    from mmjax import api
    from mmjax.interop import pretrained

    model = api.load(source, _STEP.value or None, revision=_REVISION.value or None, allow_pickle=_PICKLE.value)
    if _FAMILY.value or api.is_run(source):
        family = pretrained.save(target, model.config, model.params, model.tokenizer, _FAMILY.value)
        print(f"{target}: a {family} model, from {source}")
    else:
        write_workdir(model, target)
        print(f"{target}: a workdir with a checkpoint of step {model.step}, from {source}")
    return 0


def write_workdir(model: Any, target: Path) -> None:
    """Writes a `mmjax.api.Model` as a run that was trained elsewhere: a config and one checkpoint."""
    import jax

    from mmjax import config as configs
    from mmjax.files import write_atomically
    from mmjax.training.checkpoint import Checkpoints
    from mmjax.training.state import TrainState

    tokenizer = model.tokenizer.to_json() if model.tokenizer is not None else {}
    state = TrainState(step=jax.numpy.int32(model.step), params=model.params, opt_state={}, ema={}, health={})
    target.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(model.mesh), Checkpoints(target, model.config) as checkpoints:
        checkpoints.save(state, tokenizer, {}, {})
    content = json.dumps(configs.to_plain(model.config), indent=2) + "\n"
    write_atomically(target / "config.json", content.encode())


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__, positional=("FROM", "TO")))
