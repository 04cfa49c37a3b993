"""Flickr8k from scratch: mmjax's recipe beside open_clip, on the same pairs, with the same sizes, batches and steps.

    python benchmarks/flickr8k.py --json=flickr8k.json
    python benchmarks/flickr8k.py --data=/data/flickr8k --steps=50

mmjax runs `configs/flickr8k.py` as a user does. open_clip then trains its own two towers, with its own loss, image
transforms and a PyTorch loader of two processes, for as many steps of as many pairs, at the same learning rates. The
towers' sizes, the tokens and the strengths of the augmentations are those of the recipe. One after the other, nothing
beside them. The figures are recalls on the development split: 1,000 photographs, 5,000 captions.

    train_seconds   from the first step to the last; evaluations and checkpoints of mmjax in between count

What the peer needs: see benchmarks/quickstart.py. Exit code 2: a package or the data are missing.
"""

import argparse
import json
import math
import os
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import report
from quickstart import NEEDED, ROOT, import_torchvision, open_clip_optimizer, timed, training_seconds

RECALLS = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    if arguments.only:
        print(json.dumps(open_clip_peer(arguments)))
        return 0
    needed = NEEDED["open_clip"] if "open_clip" in arguments.peers else ()
    if not report.installed(needed, "see benchmarks/quickstart.py, or --peers="):
        return 2
    if not (arguments.data / "flickr8k_train.tar").exists():
        print(f"error: no flickr8k_train.tar in {arguments.data}; name its folder with --data", file=sys.stderr)
        return 2
    metrics = run_mmjax(arguments)
    if "open_clip" in arguments.peers:
        command = [sys.executable, __file__, "--only=open_clip", f"--data={arguments.data}", f"--seed={arguments.seed}"]
        command += [f"--steps={arguments.steps}"] if arguments.steps else []
        seconds, output = timed(command, stdout=-1)
        peer = {"total_seconds": seconds} | json.loads(output.splitlines()[-1])
        metrics |= {f"open_clip/{name}": value for name, value in peer.items()}
        metrics["train_seconds_over_open_clip"] = metrics["mmjax/train_seconds"] / metrics["open_clip/train_seconds"]
    report.print_table(metrics, "Flickr8k, development split")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the folder of the two tars")
    parser.add_argument("--steps", type=int, help="so many instead of the recipe's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", default="open_clip", help="empty for mmjax alone")
    parser.add_argument("--workdir", type=Path, help="keep mmjax's run here")
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--only", choices=["open_clip"], help="run this peer alone, in this process")
    return parser.parse_args()


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The recipe's settings that the command line changes."""
    changed = [f"--config.seed={arguments.seed}"]
    if arguments.steps:
        changed += [f"--config.train.steps={arguments.steps}", f"--config.optimizer.warmup={arguments.steps / 13}"]
    return changed


def run_mmjax(arguments: argparse.Namespace) -> dict[str, float]:
    """Runs the recipe in an empty workdir; returns its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = arguments.workdir or Path(folder) / "flickr8k"
        recipe = f"configs/flickr8k.py:data={arguments.data.resolve()}"
        command = [sys.executable, "-m", "mmjax.main", f"--config={recipe}", f"--workdir={workdir}"]
        seconds, _ = timed(command + overrides(arguments))
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        recalls = json.loads((workdir / "result.json").read_text())["metrics"]
    metrics = {"total_seconds": seconds} | training_seconds([line for line in lines if "train/loss" in line])
    metrics |= {name: recalls[f"eval/dev/{name}"] for name in RECALLS}
    return {f"mmjax/{name}": value for name, value in metrics.items()}


def open_clip_peer(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains open_clip's towers on the same pairs and evaluates them as `mmjax.evaluators.retrieval` does."""
    import torch

    import_torchvision()
    import open_clip

    from mmjax.cli import load_recipe

    config = load_recipe(str(ROOT / "configs" / "flickr8k.py") + f":data={arguments.data.resolve()}")
    steps = arguments.steps or config.train.steps
    warmup = steps / 13 if arguments.steps else config.optimizer.warmup
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    model = open_clip_model(config)
    settings = config.optimizer
    betas = (settings.b1, settings.b2)
    optimizer, schedule = open_clip_optimizer(
        model, steps, warmup, settings.learning_rate, settings.weight_decay, betas
    )
    loss_function = open_clip.loss.ClipLoss()
    times = [time.perf_counter()]
    for step, (images, texts) in enumerate(open_clip_batches(config, arguments, steps)):
        outputs = model(images, texts)
        outputs.pop("logit_bias", None)
        loss = loss_function(**outputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip_norm)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        times.append(time.perf_counter())
        if (step + 1) % 50 == 0:
            seconds = (times[-1] - times[1]) / max(step, 1)
            print(f"step {step + 1}/{steps} · loss {loss:.4f} · {seconds:.3f} s a step", file=sys.stderr)
    return {
        "train_seconds": times[-1] - times[0],
        "first_step_seconds": times[1] - times[0],
        "step_seconds": (times[-1] - times[1]) / (steps - 1),
        "million_parameters": sum(value.numel() for value in model.parameters()) / 1e6,
        **open_clip_recalls(model.eval(), config, arguments),
    }


def open_clip_model(config):
    """open_clip's two towers in the recipe's sizes."""
    import open_clip

    image, text = config.model.encoders.image, config.model.encoders.text
    vision = dict(layers=image.depth, width=image.width, head_width=image.width // image.heads, pool_type="avg")
    language = dict(layers=text.depth, width=text.width, heads=text.heads, no_causal_mask=True, pool_type="last")
    return open_clip.model.CustomTextCLIP(
        embed_dim=config.model.embed_dim,
        vision_cfg=vision | dict(image_size=image.image_size, patch_size=16, mlp_ratio=image.mlp_dim / image.width),
        text_cfg=language
        | dict(context_length=text.length, vocab_size=text.vocab_size, mlp_ratio=text.mlp_dim / text.width),
        init_logit_scale=math.log(config.model.logit_scale),
        output_dict=True,
    )


class Pairs:
    """A PyTorch data set over one of the tars: a transformed image, and the tokens of one of its captions."""

    def __init__(self, path: Path, transform, tokenizer, length: int):
        self._transform, self._tokenizer, self._length = transform, tokenizer, length
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        keys = sorted({name.partition(".")[0] for name in members})
        self.images = [members[f"{key}.jpg"] for key in keys]
        self.captions = [json.loads(members[f"{key}.json"])["captions"] for key in keys]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int):
        """One image as the transform gives it."""
        from PIL import Image

        return self._transform(Image.open(BytesIO(self.images[index])).convert("RGB"))

    def __getitem__(self, index: int):
        import torch

        captions = self.captions[index]
        caption = captions[int(torch.randint(len(captions), ()))]
        ids = self._tokenizer.encode([caption], self._length)[0]
        return self.image(index), torch.from_numpy(ids).long()


def pairs(config, arguments: argparse.Namespace, split: str) -> Pairs:
    """A split, with open_clip's transform for it; a mirror is added in training, which open_clip leaves out."""
    import open_clip
    import torchvision

    from mmjax.data import text, vocabulary
    from mmjax.data.sources import open_stream

    entry, encoders = config.streams.train, config.model.encoders
    path = vocabulary.learn(open_stream(entry), (), encoders.text.vocab_size, lambda items, *_: items)
    preprocess, training = entry.preprocess, split == "train"
    transform = open_clip.transform.image_transform(
        encoders.image.image_size,
        is_train=training,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        aug_cfg=dict(
            scale=(preprocess.crop_min_area, 1.0),
            ratio=(1 / preprocess.crop_max_aspect, preprocess.crop_max_aspect),
            color_jitter=tuple(preprocess.color_jitter),
            color_jitter_prob=preprocess.color_jitter_probability,
            use_timm=True,
        ),
    )
    if training:
        transform.transforms.insert(1, torchvision.transforms.RandomHorizontalFlip(preprocess.mirror))
    return Pairs(arguments.data / f"flickr8k_{split}.tar", transform, text.load(path), encoders.text.length)


def open_clip_batches(config, arguments: argparse.Namespace, steps: int):
    """Yields `steps` batches of a shuffled loader, epoch after epoch."""
    import torch

    loader = torch.utils.data.DataLoader(
        pairs(config, arguments, "train"),
        batch_size=config.streams.train.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            yield batch
            done += 1


def open_clip_recalls(model, config, arguments: argparse.Namespace) -> dict[str, float]:
    """The recalls of RECALLS on the development split."""
    import torch

    from mmjax.evaluators.ranking import ranks

    data = pairs(config, arguments, "dev")
    captions = [caption for captions in data.captions for caption in captions]
    owners = np.repeat(np.arange(len(data)), [len(captions) for captions in data.captions])
    ids = torch.from_numpy(data._tokenizer.encode(captions, data._length)).long()
    with torch.inference_mode():
        images = torch.stack([data.image(index) for index in range(len(data))])
        gallery = torch.cat([model.encode_image(chunk, normalize=True) for chunk in images.split(256)]).numpy()
        texts = torch.cat([model.encode_text(chunk, normalize=True) for chunk in ids.split(256)]).numpy()
    own = np.arange(len(data))
    found = {"text_to_image": ranks(texts, gallery, owners, own), "image_to_text": ranks(gallery, texts, own, owners)}
    return {name: float((found[name[: name.index("_R@")]] < int(name.rpartition("@")[2])).mean()) for name in RECALLS}


if __name__ == "__main__":
    sys.exit(main())
