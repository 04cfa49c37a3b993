"""How a step, its memory and its checkpoint grow with the devices, the batch and the parameters.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --json=scaling.json --picture=scaling.png
    python benchmarks/scaling.py --read=scaling.json --picture=scaling.png

The devices are virtual ones of one CPU, `--xla_force_host_platform_device_count`: they run the program that real
ones would, partitions and collectives included, but they share its cores. With ideal scaling, the step of a
global batch takes as long on 8 of them as on one; what it takes longer is the cost of splitting the work and of
putting the results together. Each measurement is a process of its own; rounds over all of them are repeated
`--repeats` times, and medians are reported. Where other programs run beside, the clock favours the mesh with
more devices, whose threads get more of the cores: compare CPU seconds there.

    step_seconds                median over steps on batches that are already on the devices
    step_cpu_seconds            the same, of all cores together
    step_over_one_device        step_seconds over one device's with the same global batch and model
    cpu_over_one_device         step_cpu_seconds, likewise
    step_megabytes              memory of one device in a step, from the compiled program: arguments, temporary
                                buffers and results, less the results that take the arguments' place
    parameters_megabytes        parameters on one device
    optimizer_megabytes         the optimizer's state on one device
    save_blocking_seconds       how long training waits when a checkpoint is saved
    save_seconds                until the checkpoint is whole on the disk (a temporary folder)
    restore_seconds             from the disk (the page cache) to the devices
    checkpoint_megabytes        of the files of one checkpoint

`--picture` needs matplotlib.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from report import print_table, write_json

HEADS, IMAGE_SIZE, TEXT_LENGTH, VOCAB_SIZE = 8, 60, 12, 4096
DEVICES, ROWS, BATCH = (1, 2, 4, 8), 32, 256
BATCHES = (64, 128, 256, 512)
SIZES = ((128, 4), (256, 4), (256, 8), (512, 4))  # width and layers of each tower
SIZES_BATCH = 64
WARM_UP = 3
RATIOS = {"step_seconds": "step_over_one_device", "step_cpu_seconds": "cpu_over_one_device"}
CHECKPOINTS = 3  # saved and restored so many times
# Two virtual devices on two cores can each hold the thread that the other's collective needs: XLA notices and aborts.
ATTEMPTS = 3


@dataclass(frozen=True)
class Case:
    """One measurement: a mesh with all its devices along one axis, a global batch, and two towers."""

    axis: str
    devices: int
    batch: int
    width: int = 128
    layers: int = 3

    @property
    def name(self) -> str:
        """Such as "fsdp8_batch256_width128_layers3"; one device has no axis."""
        mesh = f"{self.axis}{self.devices}" if self.devices > 1 else "one"
        return f"{mesh}_batch{self.batch}_width{self.width}_layers{self.layers}"

    @property
    def on_one_device(self) -> "Case":
        """The same batch and model, not split."""
        return Case("data", 1, self.batch, self.width, self.layers)


# What is varied -> axis of the mesh -> the cases, in the order of what is varied.
SERIES = {
    "weak": {axis: [Case(axis, count, ROWS * count) for count in DEVICES] for axis in ("data", "fsdp")},
    "strong": {axis: [Case(axis, count, BATCH) for count in DEVICES] for axis in ("data", "fsdp", "tensor")},
    "batch": {"data": [Case("data", DEVICES[-1], batch) for batch in BATCHES]},
    "parameters": {axis: [Case(axis, DEVICES[-1], SIZES_BATCH, *size) for size in SIZES] for axis in ("data", "fsdp")},
}


def all_cases() -> dict[str, Case]:
    """The cases of all series by name, and for each the one that it is compared with."""
    cases = [case for lines in SERIES.values() for line in lines.values() for case in line]
    return {case.name: case for each in cases for case in (each.on_one_device, each)}


def recipe(case: Case):
    """Two small towers on the embedded data set, whose tokenizer is all that is used of it."""
    from mmjax import config as configs

    config = configs.default()
    config.mesh.data, config.mesh[case.axis] = 1, case.devices
    config.model.embed_dim = case.width
    tower = {"width": case.width, "depth": case.layers, "mlp_dim": 4 * case.width, "heads": HEADS, "pooling": "mean"}
    config.model.encoders.image = configs.image_encoder(variant="Ti/20", image_size=IMAGE_SIZE, **tower)
    config.model.encoders.text = configs.text_encoder(
        variant="Ti", length=TEXT_LENGTH, vocab_size=VOCAB_SIZE, mask_padding=True, **tower
    )
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    config.streams.train = configs.stream(source="openmoji:en", batch_size=case.batch)
    config.train.steps = 1000
    return config


def measure(case: Case, steps: int) -> dict[str, float]:
    """All metrics of a case, in this process, which has to have as many devices."""
    from mmjax import runtime

    runtime.configure()
    import jax

    from mmjax.training import setup

    with tempfile.TemporaryDirectory() as folder:
        run = setup.prepare(recipe(case), Path(folder))
        with jax.set_mesh(run.mesh):
            state, batch = run.make_state(), random_batch(run, case)
            compiled = run.train_step.lower(state, batch, ("contrastive",)).compile()
            metrics = {"parameters": run.model_parameters} | memory(compiled, state)

            def step(state):
                state, results = compiled(state, batch)
                jax.block_until_ready((state, results))
                return state

            state, times = time_steps(step, state, steps)
            return metrics | times | time_checkpoints(run, step, state)


def random_batch(run, case: Case) -> dict:
    """A global batch on the devices: `image` uint8 [batch, height, width, 3], `text` int32 [batch, length]."""
    import numpy as np

    from mmjax.sharding import distributed
    from mmjax.sharding.rules import batch_sharding

    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (case.batch, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        "text": random.integers(1, VOCAB_SIZE, (case.batch, TEXT_LENGTH), np.int32),
    }
    return distributed.to_devices(batch, run.rows["train"], batch_sharding(run.mesh), case.batch)


def memory(compiled, state) -> dict[str, float]:
    """What one device holds, in megabytes of 1,000,000 bytes."""
    import jax

    def on_one_device(tree) -> float:
        shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
        return sum(shard.nbytes for shard in shards) / 1e6

    program = compiled.memory_analysis()
    step = program.argument_size_in_bytes + program.temp_size_in_bytes
    step += program.output_size_in_bytes - program.alias_size_in_bytes
    return {
        "step_megabytes": step / 1e6,
        "parameters_megabytes": on_one_device(state.params),
        "optimizer_megabytes": on_one_device(state.opt_state),
    }


def time_steps(step: Callable, state, steps: int) -> tuple:
    """Returns the last state, and the median seconds of a step: on the clock, and of all cores together."""
    seconds, cpu_seconds = [], []
    for _ in range(WARM_UP + steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        state = step(state)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    medians = statistics.median(seconds[WARM_UP:]), statistics.median(cpu_seconds[WARM_UP:])
    return state, dict(zip(("step_seconds", "step_cpu_seconds"), medians, strict=True))


def time_checkpoints(run, step: Callable, state) -> dict[str, float]:
    """Saves and restores the state of several steps; medians."""
    import jax

    from mmjax.training.checkpoint import Checkpoints

    blocking, saving, restoring = [], [], []
    with Checkpoints(run.workdir, run.config) as checkpoints:
        for _ in range(CHECKPOINTS):
            state = step(state)
            began = time.perf_counter()
            checkpoints.save(state, run.tokenizer.to_json(), run.fingerprints, {})
            blocking.append(time.perf_counter() - began)
            checkpoints.wait()
            saving.append(time.perf_counter() - began)
        for _ in range(CHECKPOINTS):
            began = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(int(state.step), run.target))
            restoring.append(time.perf_counter() - began)
    files = (run.workdir / "checkpoints" / str(int(state.step))).rglob("*")
    return {
        "save_blocking_seconds": statistics.median(blocking),
        "save_seconds": statistics.median(saving),
        "restore_seconds": statistics.median(restoring),
        "checkpoint_megabytes": sum(file.stat().st_size for file in files if file.is_file()) / 1e6,
    }


def measure_all(cases: dict[str, Case], repeats: int, steps: int) -> dict[str, float]:
    """Measures every case in processes of their own; medians over the rounds, and ratios to one device."""
    rounds = {name: [] for name in cases}
    for number in range(repeats * len(cases)):
        name = list(cases)[number % len(cases)]
        print(f"{number + 1}/{repeats * len(cases)} {name}", file=sys.stderr)
        flags = f"--xla_force_host_platform_device_count={cases[name].devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
        command = [sys.executable, __file__, f"--only={name}", f"--steps={steps}"]
        for attempt in range(ATTEMPTS):
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if result.returncode != -signal.SIGABRT:
                break
            print(f"{name}: its devices waited for each other, attempt {attempt + 1}", file=sys.stderr)
        result.check_returncode()
        rounds[name].append(json.loads(result.stdout.splitlines()[-1]))
    found = {
        f"{name}/{metric}": statistics.median(values[metric] for values in measured)
        for name, measured in rounds.items()
        for metric in measured[0]
    }
    for name, case in cases.items():
        if case.devices > 1:
            for metric, ratio in RATIOS.items():
                found[f"{name}/{ratio}"] = found[f"{name}/{metric}"] / found[f"{case.on_one_device.name}/{metric}"]
    return {key: found[key] for name in cases for key in found if key.startswith(f"{name}/")}


def main() -> None:
    """Measures, or reads, and reports."""
    cases = all_cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--json", type=Path, help="write the figures to this file")
    files.add_argument("--read", type=Path, help="take the figures from this file instead of measuring")
    parser.add_argument("--picture", type=Path, help="draw the figures into this file")
    parser.add_argument("--only", choices=cases, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(cases[arguments.only], arguments.steps)))
        return
    if arguments.read:
        metrics = json.loads(arguments.read.read_text())
        del metrics["environment"]
    else:
        metrics = measure_all(cases, arguments.repeats, arguments.steps)
    print_table(metrics)
    if arguments.json:
        write_json(arguments.json, metrics)
    if arguments.picture:
        from scaling_picture import draw

        draw(SERIES, metrics, arguments.picture)


if __name__ == "__main__":
    main()
