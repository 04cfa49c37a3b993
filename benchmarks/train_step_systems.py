"""The training step that benchmarks/train_step.py times: its models, in mmjax, open_clip and transformers.

Each of `MAKERS` gives a step, and a function from its seconds to what else was measured.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
from inference import import_torch

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP_NORM = 1e-4, 0.1, (0.9, 0.95), 1.0


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
