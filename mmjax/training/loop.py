"""The training loop."""

import json
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mmjax import api
from mmjax.data import pipeline
from mmjax.files import write_atomically
from mmjax.models.flops import peak_flops, train_flops
from mmjax.sharding import distributed
from mmjax.sharding.rules import batch_sharding
from mmjax.training import feedback
from mmjax.training.checkpoint import Checkpoints, saved_steps
from mmjax.training.health import BrokenRecords
from mmjax.training.setup import Setup, prepare
from mmjax.training.state import TrainState

RESULT = "result.json"  # written when a run is finished


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains from scratch, or from the last checkpoint in `workdir`, to the end.

    Returns:
      The exit code: 0 at the end of the run, 128 + signal where SIGINT or SIGTERM stopped it.

    Raises:
      UserError: the config, the data or the workdir will not do; nothing was compiled yet.
    """
    started = time.time()
    setup = prepare(config, workdir)
    steps, start = setup.steps, max(saved_steps(workdir), default=0)
    if start >= steps:
        feedback.say(f"{workdir} is finished at step {start}; delete it or name another --workdir to train anew")
        _finish(setup, _last_evaluation(workdir), started)
        return 0
    for name, entry in config.streams.items():
        for part, source in zip(entry.mixture.values() or [entry], setup.sources[name].values(), strict=True):
            embedded = " (the data set that mmjax comes with)" if part.source.startswith("openmoji") else ""
            feedback.say(f"stream {name}: {len(source):,} records of {part.source}{embedded}")
    if not start and jax.process_index() == 0:
        (workdir / RESULT).unlink(missing_ok=True)
    with jax.set_mesh(setup.mesh), Checkpoints(workdir, config) as checkpoints, StopRequest() as stop:
        writer = feedback.MetricWriter(workdir, start)
        broken = BrokenRecords(workdir, config.loader.max_broken_fraction)
        try:
            state = checkpoints.restore(start, setup.target) if start else setup.make_state()
            feedback.say(
                f"{'resuming at' if start else 'training: step'} {start} of {steps}, "
                f"{setup.model_parameters / 1e6:.1f} M parameters, {jax.device_count()} x "
                f"{jax.devices()[0].device_kind}, workdir {workdir}"
            )
            done, evaluated = _loop(setup, state, start, checkpoints, writer, stop, broken)
            checkpoints.wait()
        finally:
            writer.close()
    if broken.summary():
        feedback.say(broken.summary())
    if done < steps:
        feedback.say(f"stopped at step {done} of {steps}, checkpoint saved; the same command goes on from there")
        return 128 + stop.signal
    _finish(setup, evaluated, started)
    return 0


def _loop(
    setup: Setup,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    writer: feedback.MetricWriter,
    stop: "StopRequest",
    broken: BrokenRecords,
) -> tuple[int, Mapping[str, float]]:
    """Runs the steps from `start`; returns how many are done and the last evaluation."""
    config, steps = setup.config, setup.steps
    objectives = {name: tuple(entry.objectives or config.objectives) for name, entry in config.streams.items()}
    sizes = {name: entry.batch_size for name, entry in config.streams.items()}
    model = api.Model(config, state.params, setup.tokenizer, setup.mesh)
    tokenizer, evaluated = setup.tokenizer.to_json(), {}
    meter = feedback.Meter(train_flops(config.model), peak_flops(jax.devices()[0].device_kind))
    batches = distributed.prefetch(_on_devices(setup, start, broken))
    metrics = {}
    with feedback.TrainProgress(start, steps) as progress:
        for done in range(start + 1, steps + 1):
            began = time.perf_counter()
            stream, batch = next(batches)
            if all(value.is_ready() for value in metrics.values()):  # the devices had nothing else to do
                meter.wait(time.perf_counter() - began)
            began = time.perf_counter()
            with jax.transfer_guard("disallow"):
                state, metrics = setup.train_step(state, batch, objectives[stream])
            if done == start + 1:  # the one that compiles
                jax.block_until_ready(metrics)
                meter.restart(time.perf_counter() - began)
            else:
                meter.step(sizes[stream])
            progress.advance(done)
            last, logs = done == steps, done % config.train.log_every == 0
            stopping = stop.agreed(logs)
            if logs or last or stopping:
                report = {name: float(value) for name, value in jax.device_get(metrics).items()} | meter.read()
                report |= broken.check([*config.streams])
                writer.write(done, report)
                progress.report(done, report)
            paused = time.perf_counter()
            results = {}
            if due := setup.evaluation.due(done, last):
                current = model.with_params(state.ema if config.train.ema_decay else state.params, done)
                results = evaluated = setup.evaluation.run(due, current, setup.workdir / "pictures")
                writer.write(done, results)
            if done % config.train.checkpoint_every == 0 or last or stopping:
                checkpoints.save(state, tokenizer, setup.fingerprints, results)
            meter.pause(time.perf_counter() - paused)
            if stopping:
                return done, evaluated
    return steps, evaluated


def _on_devices(setup: Setup, start: int, broken: BrokenRecords) -> Iterator[tuple[str, dict[str, jax.Array]]]:
    """Yields (stream, global batch on the devices) for every step from `start`; notes the unreadable records."""
    sharding, entries = batch_sharding(setup.mesh), setup.config.streams
    batches = pipeline.train_batches(setup.config, setup.sources, setup.tokenizer, setup.rows, start, setup.steps)
    for stream, batch, messages in batches:
        broken.note(stream, messages, len(setup.rows[stream]))
        yield stream, distributed.to_devices(batch, setup.rows[stream], sharding, entries[stream].batch_size)


def _last_evaluation(workdir: Path) -> dict[str, float]:
    """The evaluation at the end of a finished run."""
    lines = [line for line in feedback.read_metrics(workdir / "metrics.jsonl") if any("eval/" in name for name in line)]
    return {name: value for name, value in lines[-1].items() if name.startswith("eval/")} if lines else {}


def _finish(setup: Setup, evaluated: Mapping[str, float], started: float) -> None:
    """Says how the run ended and where everything is; marks it as finished."""
    workdir = setup.workdir
    if jax.process_index() != 0:
        return
    if not (workdir / RESULT).exists():
        result = {"step": setup.steps, "seconds": round(time.time() - started, 1), "metrics": dict(evaluated)}
        write_atomically(workdir / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    feedback.show_evaluation(evaluated)
    pictures = sorted((workdir / "pictures").glob(f"*-{setup.steps:08d}.png"))
    places = {
        "checkpoints": workdir / "checkpoints",
        "metrics": workdir / "metrics.jsonl",
        "TensorBoard": f"tensorboard --logdir {workdir}",
    }
    if pictures:
        places["pictures"] = "  ".join(map(str, pictures))
    places["in Python"] = f'mmjax.load("{workdir}")'
    for name, place in places.items():
        feedback.say(f"{name + ':':13}{place}")


class StopRequest:
    """Notes the first SIGINT or SIGTERM, so that the loop ends with a checkpoint; the second one acts at once."""

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, ask: bool) -> int:
        """The signal to stop for after this step, or 0; the same in every process.

        Several processes tell each other where `ask` is true, so that they stop at the same step.
        """
        if jax.process_count() == 1:
            return self.signal
        if ask:
            self.signal = int(multihost_utils.process_allgather(np.int32(self.signal)).max())
            return self.signal
        return 0

    def _note(self, number: int, frame) -> None:
        self.signal = number
        for each, handler in self._before.items():
            signal.signal(each, handler)
        feedback.say(f"{signal.Signals(number).name}: stopping with a checkpoint; once more stops at once")
