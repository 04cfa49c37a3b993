"""A CLIP of open_clip that is the same function as a small model of mmjax, and its training in PyTorch.

What has to be chosen for that, open_clip's default in brackets: no normalisation before the first block (there is one),
tanh-approximated GELU (exact), normalisations with epsilon 1e-6 (1e-5), a text tower that pools its last position (that
of the largest id). mmjax has one parameter more, the bias of its patch embedding: it has to stay 0.

Importing this module needs no PyTorch; `open_clip_model` and what follows it does.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict
from quickstart import import_torchvision

Arrays = dict[str, np.ndarray]
MAX_LOGIT_SCALE = 100.0


def to_open_clip(tree: PyTree) -> Arrays:
    """mmjax's parameters, or a gradient of the same structure, under open_clip's names and in its layout.

    Both towers are Transformers with learned positions, the image's with a class token. The bias of the patch
    embedding, which open_clip does not have, is left out.
    """
    image, text = tree["image"], tree["text"]
    patches = np.asarray(image["patches"]["patch_embed"]["kernel"])
    side = math.isqrt(len(patches) // 3)
    arrays = {
        "visual.class_embedding": image["class_token"][0],
        "visual.positional_embedding": image["positions"]["position"],
        "visual.conv1.weight": patches.reshape(side, side, 3, -1).transpose(3, 2, 0, 1),
        "visual.proj": tree["image_projection"]["kernel"],
        "token_embedding.weight": text["embed"]["token_embed"]["embedding"],
        "positional_embedding": text["embed"]["position"],
        "text_projection": tree["text_projection"]["kernel"],
        "logit_scale": tree["logit_scale"],
        "logit_bias": tree["logit_bias"],
    }
    arrays |= _norm("visual.ln_post", image["transformer"]["norm"]) | _norm("ln_final", text["transformer"]["norm"])
    arrays |= _blocks("visual.transformer", image["transformer"]["blocks"])
    arrays |= _blocks("transformer", text["transformer"]["blocks"])
    return {name: np.array(value, np.float32, order="C") for name, value in arrays.items()}


def _norm(name: str, norm: Mapping) -> dict:
    return {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}


def _dense(name: str, dense: Mapping) -> dict:
    return {f"{name}.weight": dense["kernel"].T, f"{name}.bias": dense["bias"]}


def _blocks(name: str, blocks: Mapping) -> dict:
    """Layers come apart; the projections to queries, keys and values are one matrix in PyTorch."""
    arrays, depth = {}, len(blocks["norm1"]["scale"])
    for number in range(depth):
        block, prefix = _layer(blocks, number), f"{name}.resblocks.{number}"
        attention, parts = block["attention"], ("query", "key", "value")
        arrays |= {
            f"{prefix}.attn.in_proj_weight": np.concatenate([attention[part]["kernel"].T for part in parts]),
            f"{prefix}.attn.in_proj_bias": np.concatenate([attention[part]["bias"] for part in parts]),
        }
        arrays |= _dense(f"{prefix}.attn.out_proj", attention["out"])
        arrays |= _norm(f"{prefix}.ln_1", block["norm1"]) | _norm(f"{prefix}.ln_2", block["norm2"])
        arrays |= _dense(f"{prefix}.mlp.c_fc", block["mlp"]["up"])
        arrays |= _dense(f"{prefix}.mlp.c_proj", block["mlp"]["down"])
    return arrays


def _layer(tree: Mapping, number: int) -> dict:
    return {
        name: _layer(value, number) if isinstance(value, Mapping) else np.asarray(value[number])
        for name, value in tree.items()
    }


def open_clip_model(config: ConfigDict, weights: Arrays):
    """open_clip's model for an mmjax config with these weights, and its loss for the config's only objective."""
    import_torchvision()
    import open_clip
    import torch

    image, text = config.model.encoders.image, config.model.encoders.text
    (objective,) = (entry.kind for entry in config.objectives.values())
    torch.set_num_threads(1)  # the threads of a model this small wait for each other
    same = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
    patches = {"image_size": image.image_size, "patch_size": int(image.variant.partition("/")[2])}
    ids = {"context_length": text.length, "vocab_size": text.vocab_size, "heads": text.heads}
    with_bias = objective == "sigmoid"
    model = open_clip.model.CLIP(
        embed_dim=config.model.embed_dim,
        vision_cfg=_sizes(image) | patches | same | {"head_width": image.width // image.heads, "no_ln_pre": True},
        text_cfg=_sizes(text) | ids | same | {"pool_type": "last", "no_causal_mask": not text.causal},
        init_logit_bias=0.0 if with_bias else None,
        output_dict=True,
    )
    model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in weights.items() if with_bias or name != "logit_bias"}
    )
    return model, open_clip.loss.SigLipLoss() if with_bias else open_clip.loss.ClipLoss()


def _sizes(encoder: ConfigDict) -> dict:
    return {"layers": encoder.depth, "width": encoder.width, "mlp_ratio": encoder.mlp_dim / encoder.width}


def open_clip_gradient(config: ConfigDict, weights: Arrays, batch: Mapping[str, np.ndarray]) -> tuple[float, Arrays]:
    """The loss of one batch and its gradient with respect to every parameter of open_clip's model."""
    model, loss_function = open_clip_model(config, weights)
    loss = loss_function(**model(*_inputs(config, batch)))
    loss.backward()
    return loss.item(), {name: value.grad.numpy() for name, value in model.named_parameters()}


def open_clip_losses(
    config: ConfigDict, weights: Arrays, batches: Sequence[Mapping[str, np.ndarray]], steps: int
) -> list[float]:
    """The loss of each batch in training with the config's AdamW; `steps` is how many the schedule is made for.

    open_clip's own schedule is one step ahead of this one: (step + 1) / warmup where mmjax has step / warmup. Its own
    trainer also decays embeddings and positions; mmjax only kernels.
    """
    import torch

    recipe = config.optimizer
    model, loss_function = open_clip_model(config, weights)
    named = dict(model.named_parameters())
    decayed = [name for name, value in named.items() if value.ndim >= 2 and "embedding" not in name]
    groups = [
        {"params": [value for name, value in named.items() if name in decayed], "weight_decay": recipe.weight_decay},
        {"params": [value for name, value in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.b1, recipe.b2), eps=recipe.epsilon)

    def factor(step: int) -> float:
        if step < recipe.warmup:
            return step / recipe.warmup
        return (1 + math.cos(math.pi * (step - recipe.warmup) / (steps - recipe.warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for batch in batches:
        loss = loss_function(**model(*_inputs(config, batch)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip_norm)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
        losses.append(loss.item())
    return losses


def _inputs(config: ConfigDict, batch: Mapping[str, np.ndarray]):
    """The same pixels and ids: normalised floats [batch, 3, height, width], and int64."""
    import torch

    image = config.model.encoders.image
    pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (image.mean, image.std))
    return (pixels - mean) / std, torch.from_numpy(batch["text"]).long()
