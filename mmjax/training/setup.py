"""From a config and a folder to everything that the training loop needs; every check comes first."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mmjax import api
from mmjax import config as configs
from mmjax.data import pipeline, sources, text, vocabulary, words
from mmjax.errors import UserError
from mmjax.evaluators import Evaluation
from mmjax.files import fingerprint, write_atomically
from mmjax.models.outputs import Vocabulary
from mmjax.objectives import parts_of
from mmjax.sharding import distributed
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import batch_sharding
from mmjax.training import feedback
from mmjax.training.checkpoint import Checkpoints, DamagedCheckpoint, agreed_steps, space
from mmjax.training.gradient import Batch
from mmjax.training.init_from import Taken, replacing, taken_over, tokenizer_of
from mmjax.training.optimizer import in_steps, learning_rate_schedule, make_optimizer
from mmjax.training.state import TrainState, make_state, state_shardings, with_shardings
from mmjax.training.step import make_train_step
from mmjax.training.teacher import make_teacher, resolve

_WHOLE = "tokenizer.mmjax.json"  # in a workdir: a tokenizer that was no single file


@dataclass(frozen=True)
class Setup:
    """What a run is made of. Nothing large is computed or read before `make_state` is called.

    `compile_step` compiles `train_step` for such a batch and such objectives, before there is a state.
    """

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    sources: Mapping[str, Mapping[str, sources.Source]]
    fingerprints: Mapping[str, Mapping[str, str]]
    tokenizer: text.Tokenizer
    rows: Mapping[str, np.ndarray]
    steps: int
    model_parameters: int
    target: TrainState
    make_state: Callable[[], TrainState]
    train_step: Callable
    compile_step: Callable[[Batch, tuple[str, ...]], None]
    evaluation: Evaluation


def prepare(config: ConfigDict, workdir: Path, beat: Callable[[], None] = lambda: None) -> Setup:
    """Opens the data of a config that `validate` has checked, claims the workdir, and makes the compiled functions.

    `beat` is called while data are prepared.

    Raises:
      UserError: the config, the data or the workdir will not do.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    saved = agreed_steps(workdir)
    resolve(config, workdir, bool(saved))
    _claim(workdir, config, bool(saved))

    def progress(items: Iterable, total: int, title: str) -> Iterator:
        for item in feedback.data_progress(items, total, title):
            beat()
            yield item

    opened = {name: _open_stream(name, entry, progress) for name, entry in config.streams.items()}
    fingerprints = {
        name: {part: source.fingerprint for part, source in parts.items()} for name, parts in opened.items()
    }
    _check_data(config, workdir, saved, fingerprints)
    evaluation = Evaluation(config.evaluators, beat)
    tokenizer = _tokenizer(config, workdir, bool(saved), opened, progress)
    _check_processes(fingerprints, tokenizer)
    steps, schedule = _schedule(config, opened)
    module, vocabulary = api.make_module(config), _vocabulary(config, tokenizer)
    teacher = make_teacher(config, module, mesh, tokenizer, vocabulary)
    with jax.set_mesh(mesh):
        init = jax.jit(partial(api.init_params, config, module))  # of its three uses one traces it
        optimizer = make_optimizer(config.optimizer, jax.eval_shape(init))
        make = partial(make_state, init, optimizer, config.train.ema_decay > 0)
        shapes = jax.eval_shape(make)
    if not saved:
        _check_space(workdir, shapes)
    taken = Taken({}) if saved else taken_over(config, shapes.params, mesh)
    for line in taken.report:
        feedback.say(line)
    shardings = state_shardings(shapes, mesh)
    train_step = jax.jit(
        make_train_step(config, module, optimizer, schedule, vocabulary, teacher),
        static_argnums=2,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, P())),
    )
    given = {"teacher_params": teacher.params} if teacher and teacher.params else {}
    target, sharding = with_shardings(shapes, shardings), batch_sharding(mesh)

    # On a CPU, half of the time to compile it would go into optimising what runs once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def compile_step(batch: Batch, objectives: tuple[str, ...]) -> None:
        train_step.lower(target, batch, objectives, **given).compile()  # a call finds what was compiled

    return Setup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        sources=opened,
        fingerprints=fingerprints,
        tokenizer=tokenizer,
        rows={name: distributed.local_rows(sharding, entry.batch_size) for name, entry in config.streams.items()},
        steps=steps,
        model_parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        target=target,
        make_state=replacing(jax.jit(make, out_shardings=shardings, compiler_options=options), taken.params),
        train_step=partial(train_step, **given) if given else train_step,
        compile_step=compile_step,
        evaluation=evaluation,
    )


def _claim(workdir: Path, config: ConfigDict, resumed: bool) -> None:
    """Makes the folder and writes the config into it, or checks that it holds a run of this config."""
    path, new = workdir / "config.json", configs.to_plain(config)
    if resumed and path.exists():
        saved = configs.to_plain(api.load_config(workdir))
        differing = configs.differing_keys(saved, new)
        if differing:
            old, new = dict(configs.flatten(saved)), dict(configs.flatten(new))
            changes = ", ".join(f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in differing[:6])
            more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
            raise UserError(f"{workdir} holds a run with another config: {changes}{more}; choose another --workdir")
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(new, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write into the workdir {workdir}: {error.strerror}") from error


def _open_stream(name: str, entry: ConfigDict, progress: Callable) -> dict[str, sources.Source]:
    try:
        opened = sources.open_stream(entry, progress)
        for source in opened.values():
            needed = [name for name in entry.inputs if name == "image" or not entry.captions_optional]
            pipeline.check_readable(source, tuple(entry.preprocess.captions), inputs=needed)
        return opened
    except UserError as error:
        raise UserError(f"config.streams.{name}: {error}") from error


def _check_data(
    config: ConfigDict, workdir: Path, steps: list[int], fingerprints: Mapping[str, Mapping[str, str]]
) -> None:
    """Raises UserError where the data are not those that the run was started with."""
    saved = _saved_fingerprints(config, workdir, steps)
    if not saved:
        return
    for name, parts in fingerprints.items():
        for part, current in parts.items():
            if current != saved[name][part]:
                key = f"config.streams.{name}" + (f".mixture.{part}" if part else "")
                raise UserError(
                    f"{key}.source: its data are not those that the run in {workdir} was started with (fingerprint "
                    f"{saved[name][part]} there, {current} now); bring them back, or choose another --workdir"
                )


def _saved_fingerprints(config: ConfigDict, workdir: Path, steps: list[int]) -> dict[str, dict[str, str]]:
    """Those in the newest checkpoint that is intact; {} without one."""
    for step in reversed(steps):
        with Checkpoints(workdir, config, read_only=True) as checkpoints:
            try:
                return checkpoints.restore_fingerprints(step)
            except DamagedCheckpoint:
                continue
    return {}


def _check_processes(fingerprints: Mapping[str, Mapping[str, str]], tokenizer: text.Tokenizer) -> None:
    """Raises UserError where another process has other data or another tokenizer: its rows would not fit ours."""
    if jax.process_count() == 1:
        return
    own = int(fingerprint(fingerprints, tokenizer.to_json())[:7], 16)
    found = multihost_utils.process_allgather(np.int32(own)).tolist()
    different = [process for process, value in enumerate(found) if value != found[0]]
    if different:
        raise UserError(f"process {different[0]} sees other data, or another tokenizer, than process 0")


def _tokenizer(
    config: ConfigDict,
    workdir: Path,
    resumed: bool,
    opened: Mapping[str, Mapping[str, sources.Source]],
    progress: Callable,
) -> text.Tokenizer:
    """The tokenizer of the config; or that of the model whose token embeddings are taken over; or the one that the
    first stream's source comes with; or one learned from it.

    It is copied into the workdir.

    Raises:
      UserError: its vocabulary is larger than the model's, or it does not pad as the model expects.
    """
    encoder = config.model.encoders.text
    with_text = [(name, entry) for name, entry in config.streams.items() if "text" in entry.inputs]
    name, entry = (with_text or [*config.streams.items()])[0]
    groups = tuple(entry.preprocess.captions)
    copy = workdir / _WHOLE
    if not encoder.tokenizer and resumed and copy.exists():
        taken: text.Tokenizer | None = text.from_json(json.loads(copy.read_bytes()))
    else:
        taken = None if encoder.tokenizer else tokenizer_of(config)
    path = encoder.tokenizer or sources.tokenizer_path(entry.source, groups)
    if not path and resumed:
        path = workdir / "tokenizer.json"  # what was learned at the start
    if taken is not None:
        path = copy
    elif not path:
        room = encoder.vocab_size - ("masked" in parts_of(config))  # one token is the mask
        path = vocabulary.learn(opened[name], groups, room, progress)
    tokenizer = taken or text.load(path)
    captions = "decoder" in parts_of(config)
    if (encoder.mask_padding or captions) and tokenizer.pad_id != encoder.pad_id:
        raise UserError(
            f"config.model.encoders.text.pad_id: {encoder.pad_id} is not the padding of {path}, {tokenizer.pad_id}"
        )
    if encoder.pooling == "eos" and tokenizer.end_id != encoder.end_id:
        raise UserError(
            f"config.model.encoders.text.end_id: {encoder.end_id} is not the end token of {path}, {tokenizer.end_id}"
        )
    if captions and not config.model.decoder.start and tokenizer.start_id is None:
        raise UserError(f"config.model.decoder.start: it is off, and {path} has no start token")
    if captions and tokenizer.end_id in (None, tokenizer.pad_id):
        raise UserError(
            f"{path} ends texts with no token, or with padding: captioning could not learn where they end; use a "
            "tokenizer that has a token for it"
        )
    if tokenizer.vocab_size > encoder.vocab_size:
        raise UserError(
            f"config.model.encoders.text.vocab_size: {encoder.vocab_size} is less than the {tokenizer.vocab_size} "
            f"tokens of {path}"
        )
    if taken is not None or Path(path).is_dir():
        content = json.dumps(tokenizer.to_json()).encode()
    else:
        copy, content = workdir / f"tokenizer{Path(path).suffix}", Path(path).read_bytes()
    if resumed and copy.exists() and copy.read_bytes() != content:
        raise UserError(f"{path} is not the tokenizer that the run in {workdir} was started with: {copy}")
    if jax.process_index() == 0:
        write_atomically(copy, content)
    return tokenizer


def _vocabulary(config: ConfigDict, tokenizer: text.Tokenizer) -> Vocabulary | None:
    """What masked modelling has to know of the tokenizer; None where no objective does it.

    Raises:
      UserError: the tokenizer has no mask token, and the model's vocabulary no room for one.
    """
    if "masked" not in parts_of(config):
        return None
    size, known = config.model.encoders.text.vocab_size, tokenizer.vocab_size
    mask_id = known if tokenizer.mask_id is None else tokenizer.mask_id
    if mask_id >= size:
        raise UserError(
            f"config.model.encoders.text.vocab_size: the tokenizer has no mask token; set it to at least {known + 1}, "
            "for one after its own"
        )
    marks = np.pad(tokenizer.word_marks, (0, size - known))
    special = np.ones(size, bool)
    special[:known] = False
    special[list(tokenizer.special_ids)] = True
    return Vocabulary(mask_id, (marks & words.STARTS) > 0, (marks & words.ENDS) > 0, special)


def _schedule(config: ConfigDict, opened: Mapping[str, Mapping[str, sources.Source]]) -> tuple[int, Callable]:
    """How many steps the run has, and its learning rates; epochs and examples count the first stream's."""
    name, entry = next(iter(config.streams.items()))
    records = sum(map(len, opened[name].values()))
    unit = next(unit for unit in configs.UNITS if config.train[unit])
    steps = in_steps(config.train[unit], unit, entry.batch_size, records)
    if steps < 1:
        raise UserError(f"config.train.{unit}: {config.train[unit]} is less than one batch")
    warmup = in_steps(config.optimizer.warmup, config.optimizer.unit, entry.batch_size, records)
    return steps, learning_rate_schedule(config.optimizer, steps, warmup)


def _check_space(workdir: Path, state: TrainState) -> None:
    """Two checkpoints of a new run have to fit: the last good one stays until the next one is whole."""
    needed = 2 * space(state)
    free = shutil.disk_usage(workdir).free if jax.process_index() == 0 else needed
    if distributed.any_process(needed > free):
        raise UserError(
            f"no space in the workdir {workdir}: {free / 1e9:.2f} GB free, two checkpoints need {needed / 1e9:.2f} GB"
        )
