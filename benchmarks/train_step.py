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
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
from inference import NEEDED, import_torch
from workers import Ended, Worker, rotated

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP_NORM = 1e-4, 0.1, (0.9, 0.95), 1.0
WARM_STEPS, TURN_SECONDS = 2, 1.0


class Tower(NamedTuple):
    """The sizes of a Transformer, under transformers' names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


class Sizes(NamedTuple):
    """A model: two towers, and what they read."""

    vision: Tower
    text: Tower
    patch_size: int
    siglip: bool = False
    image_size: int = 224
    length: int = 77
    vocab_size: int = 49_408


def _of_width(width: int, heads: int, depth: int = 12) -> Tower:
    return Tower(width, depth, heads, 4 * width)


MODELS = {
    "quickstart": Sizes(_of_width(128, 4, 3), _of_width(128, 4, 2), 20, False, 60, 12, 4096),
    "Ti/16": Sizes(_of_width(192, 3), _of_width(192, 3), 16),
    "S/16": Sizes(_of_width(384, 6), _of_width(384, 6), 16),
    "B/32": Sizes(_of_width(768, 12), _of_width(512, 8), 32),
    "B/16": Sizes(_of_width(768, 12), _of_width(512, 8), 16),
    "L/14": Sizes(_of_width(1024, 16, 24), _of_width(768, 12), 14),
    "B/16-SigLIP": Sizes(_of_width(768, 12), _of_width(768, 12), 16, True, length=64, vocab_size=32_000),
    "So400m/14": Sizes(Tower(1152, 27, 16, 4304), Tower(1152, 27, 16, 4304), 14, True, length=64, vocab_size=32_000),
}
OPEN_CLIP_SIGLIPS = {"B/16-SigLIP": "ViT-B-16-SigLIP", "So400m/14": "ViT-SO400M-14-SigLIP"}
Step = Callable[[], None]
Found = dict[str, float]


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
    for model in arguments.models:
        systems = ["mmjax", *arguments.peers]
        starts = [run(arguments, rotated(systems, number), model) for number in range(arguments.starts)]
        task = model.replace("/", "")
        metrics |= {f"{task}/{name}": value for name, value in summary(starts, arguments).items()}
        if arguments.largest:
            largest = {system: largest_batch(arguments, system, model) for system in systems}
            metrics |= {f"{task}/{system}_largest_batch": batch for system, batch in largest.items()}
            for peer in arguments.peers:
                metrics[f"{task}/largest_batch_over_{peer}"] = largest["mmjax"] / max(largest[peer], 1)
    metrics["batch"] = arguments.batch
    report.print_table(metrics, f"A training step, batches of {arguments.batch}, {arguments.starts} starts")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    made = [f"{model.replace('/', '')}/mmjax_images_per_second" in metrics for model in arguments.models]
    return 0 if all(made) else 1


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


def _resident() -> int:
    """Bytes of memory that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def transformers_settings(sizes: Sizes) -> dict[str, Any]:
    """The model as transformers' config.json has it."""
    vision = sizes.vision._asdict() | {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
    text = sizes.text._asdict() | {"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.length}
    if sizes.siglip:
        return {"vision_config": vision, "text_config": text}
    vision["hidden_act"] = text["hidden_act"] = "gelu"
    text |= {"eos_token_id": sizes.vocab_size - 1, "bos_token_id": 0, "pad_token_id": 0}
    return {"vision_config": vision, "text_config": text, "projection_dim": sizes.text.hidden_size}


def make_ids(sizes: Sizes, batch: int) -> np.ndarray:
    """Random ids int32 [batch, length] whose last one is the end token."""
    ids = np.random.default_rng(0).integers(1, sizes.vocab_size - 1, (batch, sizes.length), np.int32)
    ids[:, -1] = sizes.vocab_size - 1
    return ids


def make_mmjax(model: str, arguments: argparse.Namespace, compiled: bool) -> tuple[Step, Callable[[float], Found]]:
    """mmjax's step, as `mmjax.main` compiles it."""
    from mmjax import runtime

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    runtime.configure()
    import jax

    from mmjax import api
    from mmjax import config as configs
    from mmjax.interop import clip, siglip
    from mmjax.models.flops import peak_flops, train_flops
    from mmjax.sharding.mesh import make_mesh
    from mmjax.training.optimizer import learning_rate_schedule, make_optimizer
    from mmjax.training.state import make_state
    from mmjax.training.step import make_train_step

    sizes = MODELS[model]
    to_config = siglip.to_config if sizes.siglip else clip.to_config
    config = configs.completed(to_config(transformers_settings(sizes), {}))
    for encoder in config.model.encoders.values():
        encoder.unroll, encoder.remat = arguments.unroll, arguments.remat
    recipe = config.optimizer
    recipe.learning_rate, recipe.weight_decay, recipe.grad_clip_norm = LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM
    recipe.b1, recipe.b2 = BETAS
    module, mesh = api.make_module(config), make_mesh()
    rng = np.random.default_rng(0)
    shape = (arguments.batch, sizes.image_size, sizes.image_size, 3)
    batch = {"image": rng.integers(0, 256, shape, np.uint8), "text": make_ids(sizes, arguments.batch)}
    with jax.set_mesh(mesh):
        init = partial(api.init_params, config, module)
        optimizer = make_optimizer(recipe, jax.eval_shape(init))
        train_step = make_train_step(config, module, optimizer, learning_rate_schedule(recipe, 1000, 10))
        state = [jax.jit(lambda: make_state(init, optimizer, False))()]
        batch = jax.device_put(batch)
        lowered = jax.jit(train_step, static_argnums=2, donate_argnums=0).lower(state[0], batch, ("contrastive",))
    program: list[Any] = []
    product = jax.jit(lambda a, b: a @ b)

    def step() -> None:
        with jax.set_mesh(mesh):
            if not program:
                program.append(lowered.compile())
            state[0], metrics = program[0](state[0], batch)
            jax.block_until_ready((state[0], metrics))

    def more(seconds: float) -> Found:
        device = jax.devices()[0]
        needed, counted = program[0].memory_analysis(), device.memory_stats()
        rate = train_flops(config.model, ("image", "text")) * arguments.batch / seconds
        planned = needed.argument_size_in_bytes + needed.temp_size_in_bytes
        found = {"peak_memory": counted["peak_bytes_in_use"] if counted else planned}
        if peak := peak_flops(device.device_kind):
            found["mfu"] = rate / peak
        return found | {"of_matmul_rate": rate / matmul_rate(jax, product), "tera_flops_per_second": rate / 1e12}

    if arguments.profile:
        import trace_table

        step()
        found = trace_table.traced(step, program[0].as_text(), arguments.turns, Path(arguments.profile))
        report.print_table(found, f"{arguments.profile}: open it with TensorBoard or Perfetto")
        sys.exit()
    return step, more


def matmul_rate(jax, product: Callable) -> float:
    """Floating-point operations per second of a large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    on_cpu = jax.default_backend() == "cpu"
    size, count = (2048, 5) if on_cpu else (8192, 20)
    matrix = jax.numpy.ones((size, size), jax.numpy.float32 if on_cpu else jax.numpy.bfloat16)
    product(matrix, matrix).block_until_ready()
    began, result = time.perf_counter(), matrix
    for _ in range(count):
        result = product(result, matrix)
    result.block_until_ready()
    return 2 * size**3 * count / (time.perf_counter() - began)


def make_open_clip(model: str, arguments: argparse.Namespace, compiled: bool) -> tuple[Step, Callable[[float], Found]]:
    """open_clip's model and loss."""
    torch = import_torch()
    import open_clip

    before, sizes = _resident(), MODELS[model]
    if sizes.siglip:
        settings = open_clip.get_model_config(OPEN_CLIP_SIGLIPS[model])
        settings.pop("custom_text", None)
        settings["text_cfg"] |= {"context_length": sizes.length, "vocab_size": sizes.vocab_size}
        built, loss = open_clip.model.CustomTextCLIP(**settings, output_dict=True), open_clip.loss.SigLipLoss()
    else:
        vision, text = sizes.vision, sizes.text
        built = open_clip.model.CLIP(
            embed_dim=text.hidden_size,
            vision_cfg={
                "image_size": sizes.image_size,
                "patch_size": sizes.patch_size,
                "width": vision.hidden_size,
                "layers": vision.num_hidden_layers,
                "head_width": vision.hidden_size // vision.num_attention_heads,
            },
            text_cfg={
                "context_length": sizes.length,
                "vocab_size": sizes.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
            },
            output_dict=True,
        )
        loss = open_clip.loss.ClipLoss()

    def value(run, pixels, ids):
        return loss(**run(pixels, ids))

    return torch_step(torch, built, value, sizes, arguments, compiled, before)


def make_transformers(
    model: str, arguments: argparse.Namespace, compiled: bool
) -> tuple[Step, Callable[[float], Found]]:
    """transformers' model and loss, with PyTorch's fused attention."""
    torch = import_torch()
    import transformers

    before, sizes = _resident(), MODELS[model]
    kind = "Siglip" if sizes.siglip else "CLIP"
    config = getattr(transformers, f"{kind}Config")(attn_implementation="sdpa", **transformers_settings(sizes))
    built = getattr(transformers, f"{kind}Model")(config)

    def loss(run, pixels, ids):
        return run(input_ids=ids, pixel_values=pixels, return_loss=True).loss

    return torch_step(torch, built, loss, sizes, arguments, compiled, before)


def torch_step(
    torch, model, loss: Callable, sizes: Sizes, arguments: argparse.Namespace, compiled: bool, before: int
) -> tuple[Step, Callable[[float], Found]]:
    """A step of a model whose loss is `loss(model, pixels, ids)`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True
    )
    called = torch.compile(model) if compiled else model
    pixels = torch.randn(arguments.batch, 3, sizes.image_size, sizes.image_size, device=device)
    ids = torch.from_numpy(make_ids(sizes, arguments.batch)).long().to(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss(called, pixels, ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def more(seconds: float) -> Found:
        return {"peak_memory": torch.cuda.max_memory_allocated() if device == "cuda" else _resident() - before}

    return step, more


MAKERS = {"mmjax": make_mmjax, "open_clip": make_open_clip, "transformers": make_transformers}

if __name__ == "__main__":
    sys.exit(main())
