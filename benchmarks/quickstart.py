"""The quickstart against the same task in PyTorch: seconds and recalls, from the same data on the same machine.

    python benchmarks/quickstart.py
    python benchmarks/quickstart.py --repeats=3 --json=quickstart.json
    python benchmarks/quickstart.py --peers= --steps=20

mmjax runs as a user runs it: `python -m mmjax.main --config=configs/quickstart.py`, in a process of its
own and an empty workdir. The peer, open_clip, trains two towers of like size with its own model and its
own sigmoid loss in another process; its images are decoded and resized before its clock starts, and a
batch is one indexing operation, so its loader costs it nothing. The two alternate `--repeats` times,
each time with another seed; the medians are reported. Nothing else may run on the machine: one more
busy process can slow PyTorch's threads tenfold, and JAX's far less.

The first run on a machine builds the data set and compiles; a later one finds both in the cache
(`MMJAX_CACHE`), which shows in `quickstart/total_seconds`.

    total_seconds   the whole command: imports, data, compilation, training, evaluation, checkpoints
    train_seconds   from the first step to the last; mmjax's evaluations and checkpoints in between count
    step_seconds    the mean of every step but the first, without evaluations and checkpoints

The peer needs packages that mmjax does not. torchvision has no CPU build that fits, so it is installed
without what it depends on (see `import_torchvision`):

    pip install torch==2.13.0 ftfy regex huggingface_hub safetensors tqdm pyyaml
    pip install --no-deps torchvision==0.28.0 open_clip_torch==3.3.0 timm

Exit code 2: a peer's package is not installed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import report

ROOT = Path(__file__).resolve().parent.parent
RECALLS = {
    "text_to_image_R@1": "eval/test/text_to_image_R@1",
    "image_to_text_R@1": "eval/test/image_to_text_R@1",
    "all_text_to_image_R@5": "eval/everything/text_to_image_R@5",
}
NEEDED = {"open_clip": ("torch", "torchvision", "timm", "open_clip")}
COMPARED = ("total_seconds", "train_seconds", "step_seconds")

# The peer's recipe: 1.3 M parameters.
IMAGE_SIZE, PATCH_SIZE, WIDTH, MLP_RATIO = 48, 12, 128, 2.0
TEXT_LENGTH, VOCAB_SIZE = 12, 4096
BATCH_SIZE, STEPS, WARMUP = 256, 800, 80
LEARNING_RATE, WEIGHT_DECAY, BETAS = 2e-3, 0.01, (0.9, 0.95)
SHIFT = 4  # pixels, in each direction


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    if arguments.only:
        print(json.dumps(PEERS[arguments.only](arguments)))
        return 0
    needed = [package for peer in arguments.peers for package in NEEDED[peer]]
    if not report.installed(needed, "see benchmarks/quickstart.py, or use --peers="):
        return 2
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: load average {load:.1f}; on a busy machine the seconds mislead", file=sys.stderr)
    runs = []
    for seed in range(arguments.repeats):
        metrics = run_quickstart(arguments.steps, seed)
        for peer in arguments.peers:
            metrics |= run_peer(peer, arguments, seed)
        runs.append(metrics)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    for peer in arguments.peers:
        for name in COMPARED:
            medians[f"quickstart/{name}_over_{peer}"] = medians[f"quickstart/{name}"] / medians[f"{peer}/{name}"]
    report.print_table(medians, f"Quickstart, median of {arguments.repeats}")
    if arguments.json:
        report.write_json(arguments.json, medians)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; `peers` becomes a list of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="train so many steps instead of the recipes' own")
    parser.add_argument("--peers", default="open_clip", help="comma-separated; empty for none")
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer's model")
    parser.add_argument("--only", choices=PEERS, help="run this peer alone, in this process; prints one JSON line")
    parser.add_argument("--seed", type=int, default=0, help="of --only")
    arguments = parser.parse_args()
    arguments.peers = report.chosen(parser, "peer", arguments.peers, PEERS)
    if arguments.repeats < 1 or (arguments.steps is not None and arguments.steps < 2):
        parser.error("--repeats must be 1 or more, --steps 2 or more")
    return arguments


def run_quickstart(steps: int | None, seed: int) -> dict[str, float]:
    """Runs the quickstart's command in an empty workdir; returns its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "quickstart"
        command = [sys.executable, "-m", "mmjax.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
        if seed:
            command.append(f"--config.seed={seed}")
        if steps:
            command += [f"--config.train.steps={steps}", f"--config.optimizer.warmup={warmup_steps(steps)}.0"]
        seconds, _ = timed(command)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        recalls = json.loads((workdir / "result.json").read_text())["metrics"]
    metrics = {"total_seconds": seconds} | training_seconds([line for line in lines if "train/loss" in line])
    metrics |= {name: recalls[source] for name, source in RECALLS.items()}
    return {f"quickstart/{name}": value for name, value in metrics.items()}


def training_seconds(lines: list[dict]) -> dict[str, float]:
    """The seconds of training, from the reports in `metrics.jsonl`.

    A report's `perf/step_seconds` is the time since the report before it, less evaluations and
    checkpoints, divided by the steps since then. The first report leaves the first step out and
    names its time apart.
    """
    first, last = lines[0], lines[-1]
    spans = np.diff([1, *(line["step"] for line in lines)])
    stepping = [span * line["perf/step_seconds"] for span, line in zip(spans, lines, strict=True)]
    return {
        "train_seconds": first["perf/first_step_seconds"] + stepping[0] + last["time"] - first["time"],
        "first_step_seconds": first["perf/first_step_seconds"],
        "step_seconds": float(sum(stepping)) / (last["step"] - 1),
    }


def run_peer(peer: str, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Runs a peer in a process of its own; returns its metrics."""
    command = [sys.executable, __file__, f"--only={peer}", f"--seed={seed}"]
    command += [f"--steps={arguments.steps}"] if arguments.steps else []
    command += ["--compile"] if arguments.compile else []
    seconds, output = timed(command, stdout=subprocess.PIPE)
    metrics = {"total_seconds": seconds} | json.loads(output.splitlines()[-1])
    return {f"{peer}/{name}": value for name, value in metrics.items()}


def timed(command: list[str], stdout: int | None = None) -> tuple[float, str | None]:
    """Runs a command from the repository's root; returns its wall seconds and what it wrote to `stdout`.

    Raises:
      SystemExit: the command fails.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    began = time.perf_counter()
    finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=stdout, text=True)
    if finished.returncode:
        sys.exit(f"error: exit code {finished.returncode} from {' '.join(command)}")
    return time.perf_counter() - began, finished.stdout


def warmup_steps(steps: int) -> int:
    """A tenth of the run, as in both recipes."""
    return steps * WARMUP // STEPS


def open_clip_peer(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains open_clip's towers on OpenMoji and evaluates them as `mmjax.evaluators.retrieval` does."""
    import torch

    import_torchvision()
    import open_clip

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    images, texts = load_openmoji()
    steps, model = arguments.steps or STEPS, open_clip_model()
    network = torch.compile(model) if arguments.compile else model
    optimizer, schedule = open_clip_optimizer(model, steps, warmup_steps(steps), LEARNING_RATE, WEIGHT_DECAY, BETAS)
    loss_function = open_clip.loss.SigLipLoss()
    windows = shifted_windows(images["train"])
    training_texts = torch.from_numpy(texts["train"]).long()
    order = torch.cat([torch.randperm(len(windows)) for _ in range(steps * BATCH_SIZE // len(windows) + 1)])
    times = [time.perf_counter()]
    for step in range(steps):
        rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        top, left = torch.randint(2 * SHIFT + 1, (2, BATCH_SIZE))
        outputs = network(normalise(windows[rows, :, top, left]), training_texts[rows])
        loss = loss_function(**outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        times.append(time.perf_counter())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            speed = BATCH_SIZE * step / (times[-1] - times[1])
            print(f"step {step + 1}/{steps} · loss {loss:.4f} · {speed:,.0f} examples/s", file=sys.stderr)
    return {
        "train_seconds": times[-1] - times[0],
        "first_step_seconds": times[1] - times[0],
        "step_seconds": (times[-1] - times[1]) / (steps - 1),
        **open_clip_recalls(model.eval(), images, texts),
    }


def import_torchvision() -> None:
    """Imports torchvision, which open_clip needs, next to a torch that its operators were not built for.

    torchvision's wheels may bring operators compiled for another build of torch, such as one with CUDA
    where torch is for the CPU alone. They are left out then, but two of them are described to torch all
    the same, and the import fails with "operator torchvision::nms does not exist". Once their names are
    declared it works; the operators themselves, for detection, are not needed here.
    """
    import torch

    try:
        import torchvision
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401


def load_openmoji() -> tuple[dict, dict]:
    """OpenMoji by split: images uint8 [records, 3, size, size], English names' ids int32 [records, length]."""
    from mmjax.data import image, openmoji, text
    from mmjax.data.sources import open_source

    tokenizer = text.load(openmoji.prepare() / openmoji.tokenizer_name(["en"]))
    images, texts = {}, {}
    for split in ("train", "test"):
        source = open_source("openmoji", split)
        records = [source[index] for index in range(len(source))]
        pixels = np.stack(
            [image.for_evaluation(image.decode(record["image"]), image.Fit(IMAGE_SIZE)) for record in records]
        )
        images[split] = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        texts[split] = tokenizer.encode([record["captions"]["en"][0] for record in records], TEXT_LENGTH)
    return images, texts


def open_clip_model():
    """Two small towers; where open_clip's SigLIP configurations and its CLIP ones differ, as the former."""
    import open_clip

    vision = dict(layers=3, width=WIDTH, head_width=WIDTH // 4, mlp_ratio=MLP_RATIO, pool_type="avg")
    text = dict(layers=2, width=WIDTH, heads=4, mlp_ratio=MLP_RATIO, no_causal_mask=True, pool_type="last")
    return open_clip.model.CustomTextCLIP(
        embed_dim=WIDTH,
        vision_cfg=vision | dict(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        text_cfg=text | dict(context_length=TEXT_LENGTH, vocab_size=VOCAB_SIZE, proj_bias=True),
        init_logit_scale=math.log(10),
        init_logit_bias=-10.0,
        output_dict=True,
    )


def open_clip_optimizer(model, steps: int, warmup: float, learning_rate: float, weight_decay: float, betas: tuple):
    """AdamW as in open_clip's trainer (no decay of gains, biases and the logits' scale), and its schedule."""
    import torch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    matrices = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def shifted_windows(images: np.ndarray):
    """Views of every image at every shift, on white: [records, 3, shifts, shifts, size, size]; copies nothing."""
    import torch

    padded = np.pad(images, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), constant_values=255)
    return torch.from_numpy(padded).unfold(2, IMAGE_SIZE, 1).unfold(3, IMAGE_SIZE, 1)


def normalise(images):
    """uint8 pixels to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def open_clip_recalls(model, images: dict, texts: dict) -> dict[str, float]:
    """The recalls of `RECALLS`: test captions against test images, both ways, and against all images."""
    import torch

    from mmjax.evaluators.ranking import ranks

    def encode(function, rows: np.ndarray, prepare) -> np.ndarray:
        with torch.inference_mode():
            chunks = [function(prepare(chunk), normalize=True) for chunk in torch.from_numpy(rows).split(BATCH_SIZE)]
        return torch.cat(chunks).numpy()

    captions = encode(model.encode_text, texts["test"], torch.Tensor.long)
    gallery = encode(model.encode_image, np.concatenate([images["test"], images["train"]]), normalise)
    owners = np.arange(len(gallery))
    own, drawings = owners[: len(captions)], gallery[: len(captions)]
    return {
        "text_to_image_R@1": float((ranks(captions, drawings, own, own) < 1).mean()),
        "image_to_text_R@1": float((ranks(drawings, captions, own, own) < 1).mean()),
        "all_text_to_image_R@5": float((ranks(captions, gallery, own, owners) < 5).mean()),
    }


PEERS = {"open_clip": open_clip_peer}

if __name__ == "__main__":
    sys.exit(main())
