"""The training loop."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax import api, environment
from mmjax.data import pipeline
from mmjax.errors import UserError
from mmjax.files import write_atomically
from mmjax.models.flops import peak_flops, train_flops
from mmjax.objectives import parts_of
from mmjax.sharding import distributed
from mmjax.sharding.rules import batch_sharding
from mmjax.training import feedback
from mmjax.training.broken_records import BrokenRecords
from mmjax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    agreed_steps,
    set_aside,
    steps_with_damaged_metrics,
)
from mmjax.training.setup import Setup, prepare
from mmjax.training.skips import SkipWatch
from mmjax.training.state import TrainState
from mmjax.training.time_account import TimeAccount
from mmjax.training.watchdog import Watchdog, exit_at_once
from mmjax.validation import validate

RESULT = "result.json"  # written when a run is finished


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains from scratch, or from the last checkpoint in `workdir`, to the end.

    Returns:
      The exit code: 0 at the end of the run, 128 + signal where SIGINT or SIGTERM stopped it.

    Raises:
      UserError: the config, the data or the workdir will not do, and nothing was compiled yet; or too many records
        cannot be read, too many steps in a row were skipped, or there is no space for a checkpoint.
    """
    started = time.time()
    validate(config, jax.device_count())
    with Watchdog(workdir, jax.process_index(), config.health.hang_timeout_seconds) as watchdog:
        setup = prepare(config, workdir, watchdog.beat)
        watchdog.beat()
        return _train(setup, watchdog, started)


def _train(setup: Setup, watchdog: Watchdog, started: float) -> int:
    config, workdir = setup.config, setup.workdir
    for name, entry in config.streams.items():
        for part, source in zip(entry.mixture.values() or [entry], setup.sources[name].values(), strict=True):
            embedded = " (the data set that mmjax comes with)" if part.source.startswith("openmoji") else ""
            feedback.say(f"stream {name}: {len(source):,} records of {part.source}{embedded}")
    with jax.set_mesh(setup.mesh), StopRequest() as stop:
        start, make_state = _initial_state(setup)
        if start >= setup.steps:
            feedback.say(f"{workdir} is finished at step {start}; delete it or name another --workdir to train anew")
            _finish(setup, _last_evaluation(workdir), started)
            return 0
        if jax.process_index() == 0:
            (workdir / RESULT).unlink(missing_ok=True)
        environment.write(workdir)
        feedback.say(
            f"{'resuming at' if start else 'training: step'} {start} of {setup.steps}, "
            f"{setup.model_parameters / 1e6:.1f} M parameters, {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}, workdir {workdir}"
        )
        with Run(setup, start, stop, watchdog) as run:
            done, evaluated = run.train(make_state)
    for line in run.summary():
        feedback.say(line)
    if done < setup.steps:
        feedback.say(f"stopped at step {done} of {setup.steps}, checkpoint saved; the same command goes on from there")
        return 128 + stop.signal
    _finish(setup, evaluated, started)
    return 0


def _initial_state(setup: Setup) -> tuple[int, Callable[[], TrainState]]:
    """The step of the newest checkpoint that is intact, or 0, and what gives the state after it.

    Raises:
      UserError: there were checkpoints, and all are damaged.
    """
    damaged = steps_with_damaged_metrics(setup.workdir)
    for step in damaged:
        feedback.say(f"the metrics of checkpoint {step} are damaged; it is now in {set_aside(setup.workdir, step)}")
    found = agreed_steps(setup.workdir)
    for step in reversed(found):
        with Checkpoints(setup.workdir, setup.config, read_only=True) as checkpoints:
            try:
                return step, partial(lambda state: state, checkpoints.restore(step, setup.target))
            except DamagedCheckpoint as error:
                fault = str(error)  # the error itself would keep the arrays
        place = set_aside(setup.workdir, step)
        feedback.say(f"{fault}; it is now in {place}, and the one before it is used")
    if found or damaged:
        raise UserError(f"no checkpoint in {setup.workdir} is intact; the same command starts the run anew")
    return 0, setup.make_state


class Run:
    """One session of a run: its steps, and what is reported, evaluated and saved between them."""

    def __init__(self, setup: Setup, start: int, stop: "StopRequest", watchdog: Watchdog):
        self._setup, self._start, self._stop, self._watchdog = setup, start, stop, watchdog
        config, workdir = setup.config, setup.workdir
        self._account = TimeAccount(workdir, start)
        self._broken = BrokenRecords(workdir, config.loader.max_broken_fraction)
        self._meter = feedback.Meter(
            self._account, train_flops(config.model, parts_of(config)), peak_flops(jax.devices()[0].device_kind)
        )
        self._skips = SkipWatch(setup)

    def __enter__(self) -> "Run":
        self._checkpoints = Checkpoints(self._setup.workdir, self._setup.config)
        self._writer = feedback.MetricWriter(self._setup.workdir, self._start)
        self._account.lap("start")
        self._account.save()
        self._watchdog.beat()
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._checkpoints.__exit__(*exception)  # waits for what is being saved
        finally:
            self._account.lap("checkpoint")
            self._account.save()
            self._writer.close()

    def summary(self) -> list[str]:
        """Lines for the end of the session."""
        return [line for line in (self._broken.summary(), self._account.summary()) if line]

    def train(self, make_state: Callable[[], TrainState]) -> tuple[int, Mapping[str, float]]:
        """Runs the steps that are left; returns how many are done and the last evaluation."""
        setup, config, meter = self._setup, self._setup.config, self._meter
        objectives = {name: tuple(entry.objectives or config.objectives) for name, entry in config.streams.items()}
        model = api.Model(config, setup.target.params, setup.tokenizer, setup.mesh, on_batch=self._watchdog.beat)
        evaluated: Mapping[str, float] = {}
        batches = distributed.prefetch(_on_devices(setup, self._start, self._broken))
        metrics: Mapping[str, jax.Array] = {}
        with feedback.TrainProgress(self._start, setup.steps) as progress, ThreadPoolExecutor(1) as beside:
            making = beside.submit(_under, setup.mesh, make_state)  # its program compiles while the step's does
            for done in range(self._start + 1, setup.steps + 1):
                meter.lap("steps")
                stream, batch = next(batches)
                idle = all(value.is_ready() for value in metrics.values())  # the devices had nothing else to do
                meter.lap("data_wait" if idle else "steps")
                first, last = done == self._start + 1, done == setup.steps
                if first:
                    setup.compile_step(batch, objectives[stream])
                    state = making.result()
                with jax.transfer_guard("disallow"):
                    state, metrics = setup.train_step(state, batch, objectives[stream])
                if first:
                    jax.block_until_ready(metrics)
                stopping = self._stop.agreed(done)
                logs = done % config.train.log_every == 0 or last or stopping
                saves = done % config.train.checkpoint_every == 0 or last or stopping
                fault = self._skips.check(done, metrics, everything=saves)
                meter.step(done, config.streams[stream].batch_size, first)
                if first:
                    self._account.save()
                self._watchdog.beat()
                progress.advance(done)
                if logs:
                    report = {name: float(value) for name, value in jax.device_get(metrics).items()} | meter.read()
                    report |= self._broken.check([*config.streams])
                    self._writer.write(done, report)
                    self._account.save()
                    progress.report(done, report)
                if fault:
                    state = self._skips.go_back(fault, done, state, self._checkpoints)
                    meter.lap("restart")
                interrupted = stopping and not last
                if interrupted:  # before an evaluation, for which there may be no time
                    self._save(state, {})
                results: dict[str, float] = {}
                if due := setup.evaluation.due(done, last):
                    current = model.with_params(state.ema if config.train.ema_decay else state.params, done)
                    results = evaluated = setup.evaluation.run(due, current, setup.workdir / "pictures")
                    self._writer.write(done, results)
                    meter.lap("evaluation")
                if interrupted:
                    return done, evaluated
                if saves:
                    self._save(state, results)
        return setup.steps, evaluated

    def _save(self, state: TrainState, results: Mapping[str, float]) -> None:
        setup = self._setup
        self._checkpoints.save(state, setup.tokenizer.to_json(), setup.fingerprints, results)
        self._meter.lap("checkpoint")
        self._watchdog.beat()


def _under(mesh: Mesh, function: Callable[[], TrainState]) -> TrainState:
    with jax.set_mesh(mesh):  # which is a matter of each thread
        return function()


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
    """Notes SIGINT or SIGTERM, so that the loop ends with a checkpoint; a second SIGINT (Ctrl-C) acts at once.

    SIGTERM is how Kubernetes, SLURM and the clouds give notice of a preemption, sometimes more than once.
    """

    def __init__(self):
        self.signal = 0
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopRequest":
        # Among several processes jax itself waits for SIGTERM, and tells the others of it.
        numbers = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        self._arrived, arriving = socket.socketpair()
        arriving.setblocking(False)
        self._arriving, self._arriving_before = arriving, signal.set_wakeup_fd(arriving.fileno())
        threading.Thread(target=self._end_at_second, name="second Ctrl-C", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        signal.set_wakeup_fd(self._arriving_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._arriving.close()  # which ends the thread

    def agreed(self, step: int) -> int:
        """The signal to stop for after this step, or 0; all processes stop after the same step."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return self.signal
        return 0 if self._several else self.signal

    def _note(self, number: int, frame) -> None:
        if self.signal:
            return
        self.signal = number
        feedback.say(f"{signal.Signals(number).name}: stopping with a checkpoint; Ctrl-C stops at once")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _end_at_second(self) -> None:
        """Runs in a thread of its own: `_note` is not called while the main one waits for a device that hangs."""
        noted = False
        while number := self._arrived.recv(1)[:1]:
            if noted and number[0] == signal.SIGINT:
                exit_at_once(128 + signal.SIGINT, "interrupted; the last checkpoint is intact")
            noted = noted or number[0] in self._before
        self._arrived.close()
