"""Images per second of a whole training step of CLIP and SigLIP, beside open_clip and transformers in PyTorch.

    python benchmarks/train_step.py --peers=open_clip,transformers --models=B/32,B/16,L/14,So400m/14 --batch=256
    python benchmarks/train_step.py --models=quickstart,Ti/16,S/16 --batch=32 --json=train_step.json
    python benchmarks/train_step.py --peers= --models=B/16 --profile=trace

A step is forward, backward, a global norm that is clipped, and AdamW, on random pixels and ids that are on the device
already; images of 224 pixels (the quickstart's: 60), texts of 77 tokens (SigLIP's: 64, the quickstart's: 12). All
systems have the same towers, poolings, activations and loss. On a GPU they compute in bfloat16 with float32 weights, on
a CPU in float32. mmjax reads uint8 pixels and normalises them, the peers are given normalised ones. PyTorch runs with
its fused attention and its fused AdamW, and `..._compiled` through `torch.compile`, which is the default on a GPU.

Each system is a process of its own. On a CPU they live at the same time and take turns of a second of steps or one
step, `--turns` times, so that a machine which gets slower and faster does so to all; its memory has to hold them all.
On a GPU one process comes after the other, so that each has the memory for itself. All of that `--starts` times.
Figures are medians over the turns of all starts; of each model, as in `B16/mfu`:

    images_per_second           and mmjax's tera_flops_per_second, of matrix products
    mfu                         floating-point operations of the matrix products, by formula, over the device's dense
                                bfloat16 peak; on GPUs and TPUs alone
    of_matmul_rate              the same over the rate of one large matrix product, after the turn in the same process
    first_step_seconds          tracing and compiling, or finding it in the cache, and the first step
    peak_memory                 bytes: of the device's allocator; on a CPU what the compiled program needs, and by how
                                much a peer's process grew
    largest_batch               with `--largest`: to an eighth, by trying
    over_PEER                   images per second over the peer's, of one turn each
    peak_memory_over_PEER       peak memory over the peer's

`--profile` writes a trace of mmjax's step into a folder and prints where its time goes, by the kind of kernel.

The peers need packages that mmjax does not: see benchmarks/quickstart.py, and `pip install transformers==5.24.0`.
Exit code 1: mmjax failed with one of the models. Exit code 2: a peer's package is not installed.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import report
from inference import NEEDED
from train_step_systems import MAKERS, MODELS, Found
from workers import Ended, Worker, rotated

WARM_STEPS, TURN_SECONDS = 2, 1.0


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    if arguments.only:
        serve(arguments)
        return 0
    needed = [package for peer in arguments.peers for package in NEEDED[peer]]
    if not report.installed(needed, "see benchmarks/train_step.py, or use --peers="):
        return 2
    metrics: dict[str, float] = {}
    complete = True
    for model in arguments.models:
        systems = ["mmjax", *arguments.peers]
        starts = [run(arguments, rotated(systems, number), model) for number in range(arguments.starts)]
        found = summary(starts, arguments)
        complete = complete and "mmjax_images_per_second" in found
        if arguments.largest:
            largest = {system: largest_batch(arguments, system, model) for system in systems}
            found |= {f"{system}_largest_batch": batch for system, batch in largest.items()}
            for peer in arguments.peers:
                found[f"largest_batch_over_{peer}"] = largest["mmjax"] / max(largest[peer], 1)
        metrics |= report.of_model(model, found)
    metrics["batch"] = arguments.batch
    report.print_table(metrics, f"A training step, batches of {arguments.batch}, {arguments.starts} starts")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    return 0 if complete else 1


def parse_arguments() -> argparse.Namespace:
    """The command line; `peers` and `models` become lists of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="quickstart,Ti/16,S/16", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--peers", help=f"of {', '.join(NEEDED)}; empty for none; by default open_clip, transformers")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--turns", type=int, default=5, help="of each start, a second of steps or one step")
    parser.add_argument("--starts", type=int, default=3, help="of each system")
    parser.add_argument("--unroll", type=int, default=0, help="mmjax's layers in one iteration of its scan; 0: all")
    parser.add_argument("--remat", default="none", help="what mmjax computes again in the backward pass")
    parser.add_argument("--largest", action="store_true", help="also find the largest batch that fits")
    parser.add_argument(
        "--profile", metavar="FOLDER", help="trace mmjax's step `--turns` times, print where its time goes, and end"
    )
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--only", choices=("mmjax", *NEEDED), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peers is None:
        ending = "_compiled" if _has_gpu() else ""
        arguments.peers = f"open_clip{ending},transformers{ending}"
    arguments.peers = report.chosen(parser, "peer", arguments.peers, NEEDED)
    arguments.models = report.chosen(parser, "model", arguments.models, MODELS)
    if min(arguments.batch, arguments.turns, arguments.starts) < 1 or not arguments.models:
        parser.error("--batch, --turns and --starts must be 1 or more, --models not empty")
    if arguments.profile:
        arguments.only, arguments.models = "mmjax", arguments.models[:1]
    return arguments


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def run(arguments: argparse.Namespace, systems: list[str], model: str) -> dict[str, list[Found]]:
    """What each of these systems found when it was warm, and after each turn.

    Those that failed, for want of memory say, are left out, and what they said is shown.
    """
    groups = [[system] for system in systems] if _has_gpu() else [systems]
    return {system: found for group in groups for system, found in together(arguments, group, model).items()}


def together(arguments: argparse.Namespace, systems: list[str], model: str) -> dict[str, list[Found]]:
    """The same of systems that live at the same time and take turns."""
    workers: dict[str, Worker] = {}
    found: dict[str, list[Found]] = {system: [] for system in systems}

    def note(system: str, text: str = "") -> None:
        try:
            found[system].append(workers[system].ask(text) if text else workers[system].answer())
        except Ended as error:
            print(f"{system}, {model}, {arguments.batch}: {error.last_line}", file=sys.stderr)
            del workers[system], found[system]

    with ExitStack() as stack:
        for system in systems:
            workers[system] = stack.enter_context(start(arguments, system, model, arguments.batch))
            note(system)  # it is warm
        for number in range(arguments.turns):
            for system in rotated([*workers], number):
                note(system, "steps")
    for system, (_, *turns) in found.items():
        rate = arguments.batch / statistics.median(turn["seconds"] for turn in turns)
        print(f"{model:12} {system:22} {rate:10.1f} images/s", file=sys.stderr)
    return found


def start(arguments: argparse.Namespace, system: str, model: str, batch: int) -> Worker:
    """The process of a system."""
    command = [f"--only={system}", f"--models={model}", f"--batch={batch}", "--peers="]
    return Worker(__file__, [*command, f"--unroll={arguments.unroll}", f"--remat={arguments.remat}"])


def fits(arguments: argparse.Namespace, system: str, model: str, batch: int) -> bool:
    """Whether a system can make steps with such a batch."""
    with start(arguments, system, model, batch) as worker:
        try:
            worker.answer()
        except Ended as error:
            print(f"{model:12} {system:22} {batch:10}: {error.last_line}", file=sys.stderr)
            return False
    print(f"{model:12} {system:22} {batch:10} fits", file=sys.stderr)
    return True


def largest_batch(arguments: argparse.Namespace, system: str, model: str) -> int:
    """The largest batch that fits, to an eighth; 0 if not even `--batch` does."""
    most, batch = 0, arguments.batch
    while fits(arguments, system, model, batch):
        most, batch = batch, 2 * batch
    fails = batch
    while most and fails - most > most // 8:
        middle = (most + fails) // 2 // 8 * 8
        if middle <= most:
            break
        most, fails = (middle, fails) if fits(arguments, system, model, middle) else (most, middle)
    return most


def summary(starts: list[dict[str, list[Found]]], arguments: argparse.Namespace) -> dict[str, float]:
    """The medians over turns and starts, and those of mmjax's ratios to the peers; what failed is left out."""
    metrics: dict[str, float] = {}
    for system in ("mmjax", *arguments.peers):
        found = [answer for start in starts for answer in start.get(system, ())]
        medians = {
            name: statistics.median(answer[name] for answer in found if name in answer)
            for name in dict.fromkeys(name for answer in found for name in answer)
        }
        if medians:
            metrics[f"{system}_images_per_second"] = arguments.batch / medians.pop("seconds")
            metrics |= {name if system == "mmjax" else f"{system}_{name}": value for name, value in medians.items()}
    for peer in arguments.peers:
        turns = [
            pair
            for start in starts
            if {"mmjax", peer} <= start.keys()
            for pair in zip(start["mmjax"][1:], start[peer][1:], strict=True)
        ]
        if turns:
            metrics[f"over_{peer}"] = statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in turns)
            memory = [ours["peak_memory"] / theirs["peak_memory"] for ours, theirs in turns]
            metrics[f"peak_memory_over_{peer}"] = statistics.median(memory)
    return metrics


def serve(arguments: argparse.Namespace) -> None:
    """A worker: one system's steps, a turn of them for each line that comes in."""
    answers, sys.stdout = sys.stdout, sys.stderr  # for what libraries print
    (model,) = arguments.models
    system = arguments.only.removesuffix("_compiled")
    step, more = MAKERS[system](model, arguments, system != arguments.only)
    began = time.perf_counter()
    step()
    answer = {"first_step_seconds": time.perf_counter() - began}
    for _ in range(WARM_STEPS - 1):
        step()
    print(json.dumps(answer), file=answers, flush=True)
    for _ in sys.stdin:
        began, count, passed = time.perf_counter(), 0, 0.0
        while passed < TURN_SECONDS:
            step()
            count, passed = count + 1, time.perf_counter() - began
        seconds = passed / count
        print(json.dumps({"seconds": seconds} | more(seconds)), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(main())
