"""Images and texts per second of a CLIP ViT-B/16 on a CPU, beside open_clip and transformers in PyTorch.

    python benchmarks/inference.py --json=inference.json
    python benchmarks/inference.py --peers=open_clip,open_clip_compiled,transformers,transformers_compiled
    python benchmarks/inference.py --peers= --batch=1 --rounds=20 --starts=1

The model has the sizes of CLIP's ViT-B/16 (149.6 M parameters; images of 224 pixels, texts of 77 tokens, width 768 and
512) and random weights, float32. One call is timed as a whole: from uint8 pixels at the model's size, or ids, to
features of unit norm in NumPy arrays. PyTorch runs in evaluation and inference mode, with fused attention and
as many threads as there are cores; `..._compiled` is the same through `torch.compile`.

    image     `--batch` images
    text      `--batch` texts of 77 tokens
    caption   `--batch` captions of 8 to 16 tokens. mmjax cuts the padding off by itself; transformers is given ids as
              its tokenizer pads them (`padding=True`: to the longest); open_clip takes 77 alone

Each system lives in a process of its own, is warm before the first round, and waits while another one works; they take
turns, call by call, `--rounds` times. Where a process's memory lies makes it faster or slower by a tenth for as long as
it lives, so all of them are started `--starts` times. Rates are medians; a ratio is the median of the rounds' ratios,
which a machine that gets slower and faster disturbs least. Where other programs take turns on the processors, who has
more threads gets more of them, and threads that wait for each other lose most; so the ratio of rows per processor
second (`..._per_cpu`) is reported too, and `--cores=0` pins every system to one core.

The peers need packages that mmjax does not: see benchmarks/quickstart.py, and `pip install transformers==5.24.0`.
Exit code 2: a peer's package is not installed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import report
from workers import Ended, Worker, rotated

IMAGE_SIZE, PATCH_SIZE, EMBED_DIM = 224, 16, 512
TEXT_LENGTH, VOCAB_SIZE = 77, 49_408
END_ID = VOCAB_SIZE - 1
CAPTION_LENGTHS = (8, 16)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NEEDED = {
    "open_clip": ("torch", "torchvision", "timm", "open_clip"),
    "transformers": ("torch", "torchvision", "transformers"),
}
NEEDED |= {f"{name}_compiled": packages for name, packages in NEEDED.items()}
UNITS = {"image": "images", "text": "texts", "caption": "texts"}
TASKS = tuple(UNITS)
Encode = Callable[[np.ndarray], np.ndarray]


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    if arguments.only:
        serve(arguments)
        return 0
    needed = [package for peer in arguments.peers for package in NEEDED[peer]]
    if not report.installed(needed, "see benchmarks/inference.py, or use --peers="):
        return 2
    rounds = [each for _ in range(arguments.starts) for each in measure(arguments)]
    metrics = summary(rounds, arguments.batch) | {"load_average": os.getloadavg()[0]}
    report.print_table(metrics, f"Batches of {arguments.batch}, {len(rounds)} rounds")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; `peers` and `tasks` become lists of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="open_clip,transformers", help=f"of {', '.join(NEEDED)}; empty for none")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--batch", type=int, default=16, help="rows of a call")
    parser.add_argument("--rounds", type=int, default=3, help="of each start")
    parser.add_argument("--starts", type=int, default=5, help="of all processes")
    parser.add_argument("--activation", choices=("quick_gelu", "gelu"), default="quick_gelu", help="of the MLPs")
    parser.add_argument("--cores", help="pin every system to these, as in 0 or 0,1")
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--only", choices=("mmjax", *NEEDED), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.peers = report.chosen(parser, "peer", arguments.peers, NEEDED)
    arguments.tasks = [task for task in TASKS if task in arguments.tasks.split(",")]
    if min(arguments.batch, arguments.rounds, arguments.starts) < 1 or not arguments.tasks:
        parser.error("--batch, --rounds and --starts must be 1 or more, --tasks some of " + ", ".join(TASKS))
    return arguments


def measure(arguments: argparse.Namespace) -> list[dict[str, dict]]:
    """Of each round {"system/task": {"seconds": ..., "cpu_seconds": ...}}.

    Raises:
      SystemExit: a worker has ended.
    """
    systems = ["mmjax", *arguments.peers]
    with ExitStack() as stack:
        workers = {
            system: stack.enter_context(Worker(__file__, [f"--only={system}", *sys.argv[1:]])) for system in systems
        }
        try:
            for worker in workers.values():
                worker.answer()  # it is warm
            return [
                {f"{system}/{task}": workers[system].ask(task) for task in arguments.tasks for system in turn}
                for turn in (rotated(systems, number) for number in range(arguments.rounds))
            ]
        except Ended as error:
            sys.exit(f"error: a worker has ended: {error}")


def serve(arguments: argparse.Namespace) -> None:
    """A worker: runs each task whose name comes in, and writes the seconds that it took."""
    answers, sys.stdout = sys.stdout, sys.stderr  # for what libraries print
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    system = arguments.only.removesuffix("_compiled")
    encoders = MAKERS[system](arguments.activation, system != arguments.only)
    inputs = make_inputs(arguments.batch)
    if system != "mmjax":
        inputs["image"] = np.ascontiguousarray(inputs["image"].transpose(0, 3, 1, 2))
    if system == "transformers":
        inputs["caption"] = inputs["caption"][:, : CAPTION_LENGTHS[1]]
    for task in arguments.tasks * 2:
        features = encoders["image" if task == "image" else "text"](inputs[task])
        assert features.shape == (arguments.batch, EMBED_DIM) and features.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-4)
    print("{}", file=answers, flush=True)
    for task in map(str.strip, sys.stdin):
        began, cpu_began = time.perf_counter(), time.process_time()
        encoders["image" if task == "image" else "text"](inputs[task])
        found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
        print(json.dumps(found), file=answers, flush=True)


def make_inputs(batch: int) -> dict[str, np.ndarray]:
    """Pixels uint8 [batch, 224, 224, 3], and ids int32 [batch, 77] of texts and of captions, padded with 0."""
    rng = np.random.default_rng(0)
    found = {"image": rng.integers(0, 256, (batch, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)}
    for task, lengths in (("text", (TEXT_LENGTH, TEXT_LENGTH)), ("caption", CAPTION_LENGTHS)):
        ids = rng.integers(1, END_ID - 1, (batch, TEXT_LENGTH), np.int32)
        ends = rng.integers(lengths[0], lengths[1] + 1, batch) - 1
        ends[0] = lengths[1] - 1  # the longest is there
        ids[np.arange(TEXT_LENGTH) > ends[:, None]] = 0
        ids[np.arange(batch), ends] = END_ID
        found[task] = ids
    return found


def make_mmjax(activation: str, compiled: bool) -> dict[str, Encode]:
    """mmjax's model, from random weights; a "text" is its ids, so that its tokenizer has nothing to do."""
    from mmjax import runtime

    runtime.configure_jax()  # as `mmjax.load` does
    import jax

    from mmjax import api
    from mmjax import config as configs
    from mmjax.interop import clip
    from mmjax.sharding.mesh import make_mesh

    vision = {"patch_size": PATCH_SIZE, "hidden_act": activation}
    theirs = {"vision_config": vision, "text_config": {"hidden_act": activation}}
    config, mesh = configs.completed(clip.to_config(theirs, {})), make_mesh()
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: api.init_params(config, api.make_module(config)))()
    tokenizer = SimpleNamespace(encode=lambda texts, length: np.stack(texts))
    model = api.Model(config, params, tokenizer, mesh)
    return {"image": lambda rows: model.encode_rows("image", len(rows), rows.__getitem__), "text": model.encode_text}


def make_open_clip(activation: str, compiled: bool) -> dict[str, Encode]:
    """open_clip's model of this size."""
    torch = import_torch()
    import open_clip

    model = open_clip.create_model("ViT-B-16", force_quick_gelu=activation == "quick_gelu").eval()
    return torch_encoders(torch, model.encode_image, model.encode_text, compiled)


def make_transformers(activation: str, compiled: bool) -> dict[str, Encode]:
    """transformers' model of this size, with PyTorch's fused attention."""
    torch = import_torch()
    import transformers

    sizes = {
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "patch_size": PATCH_SIZE,
            "hidden_act": activation,
        },
        "text_config": {"hidden_act": activation, "eos_token_id": END_ID},
    }
    config = transformers.CLIPConfig(projection_dim=EMBED_DIM, attn_implementation="sdpa", **sizes)
    model = transformers.CLIPModel(config).eval()

    def image(pixels):
        return model.get_image_features(pixel_values=pixels).pooler_output

    def text(ids):
        return model.get_text_features(input_ids=ids).pooler_output

    return torch_encoders(torch, image, text, compiled)


def import_torch():
    """PyTorch, beside a torchvision that can be imported."""
    from quickstart import import_torchvision

    import_torchvision()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch


def torch_encoders(torch, image: Callable, text: Callable, compiled: bool) -> dict[str, Encode]:
    """Encoders of arrays, from two functions of tensors."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))

    def whole_image(pixels):
        return torch.nn.functional.normalize(image((pixels.float() - mean) / std), dim=-1)

    def whole_text(ids):
        return torch.nn.functional.normalize(text(ids.long()), dim=-1)

    def of_arrays(function: Callable) -> Encode:
        function = torch.compile(function) if compiled else function

        def encode(rows: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return function(torch.from_numpy(rows)).numpy()

        return encode

    return {"image": of_arrays(whole_image), "text": of_arrays(whole_text)}


MAKERS = {"mmjax": make_mmjax, "open_clip": make_open_clip, "transformers": make_transformers}


def summary(rounds: Sequence[Mapping[str, Mapping[str, float]]], batch: int) -> dict[str, float]:
    """The medians over the rounds, and those of the ratios to mmjax."""
    metrics = {}
    for task in TASKS:
        systems = [name.removesuffix(f"/{task}") for name in rounds[0] if name.endswith(f"/{task}")]
        own, peers = f"mmjax/{task}", [system for system in systems if system != "mmjax"]
        for system in ["mmjax", *peers] if systems else ():
            seconds = statistics.median(found[f"{system}/{task}"]["seconds"] for found in rounds)
            metrics[f"{task}/{system}_{UNITS[task]}_per_second"] = batch / seconds
        for system in peers:
            for measured, ending in (("seconds", ""), ("cpu_seconds", "_per_cpu")):
                ratios = [found[f"{system}/{task}"][measured] / found[own][measured] for found in rounds]
                metrics[f"{task}/over_{system}{ending}"] = statistics.median(ratios)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
