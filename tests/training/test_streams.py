"""Runs whose streams hold other things than pairs, or feed objectives of their own."""

from pathlib import Path

import numpy as np
import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.data import sources
from mmjax.errors import UserError
from mmjax.training import loop, setup
from mmjax.training.feedback import read_metrics
from tests import tiny
from tests.data import samples


def config_of(steps=4, **streams):
    """No objectives yet, and these streams in place of the usual one."""
    config = tiny.get_config(steps)
    config.model.encoders.image.depth = config.model.encoders.text.depth = 1
    config.model.encoders.text.vocab_size = 4104  # one more than the tokenizer's for the mask
    config.objectives, config.streams, config.evaluators = {}, {}, {}
    for name, fields in streams.items():
        config.streams[name] = configs.stream(**{"source": "openmoji:en", "batch_size": 16} | fields)
    config.optimizer.warmup, config.optimizer.learning_rate = 1.0, 0.01
    return config


def train(config, workdir):
    """Runs it to the end; returns what it reported step by step."""
    assert loop.train(config, workdir) == 0
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, config.train.steps + 1))
    assert all(np.isfinite(line["train/loss"]) for line in lines)
    assert lines[-1]["train/skipped_steps"] == 0
    return lines


def losses(lines, name):
    return [line[f"train/{name}_loss"] for line in lines if f"train/{name}_loss" in line]


def test_records_without_a_caption_train_beside_those_with_one(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(samples.COUNT):
        (folder / f"{number}.png").write_bytes(samples.png(number))
        if number % 3:
            (folder / f"{number}.txt").write_text(f"picture {number}")
    stream = {"source": f"folder:{folder}", "split": "", "captions_optional": True}
    config = config_of(6, train=stream)
    config.model.decoder = configs.decoder(depth=1)
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    config.objectives.captioning = configs.objective(kind="captioning")
    lines = train(config, tmp_path / "run")
    assert losses(lines, "captioning")[-1] < losses(lines, "captioning")[0]
    assert all(line["train/contrastive_image_grad_norm"] > 0 for line in lines)
    image = np.full((20, 24, 3), 200, np.uint8)
    assert len(api.load(tmp_path / "run").caption([image], beams=2)) == 1


def test_captioning_has_to_know_padding_and_the_end_of_a_text(tmp_path, openmoji_folder):
    config = config_of(pairs={})
    config.model.decoder = configs.decoder(depth=1)
    config.objectives.captioning = configs.objective(kind="captioning")
    config.model.encoders.text.update(mask_padding=False, pad_id=3)
    with pytest.raises(UserError, match=r"pad_id: 3 is not the padding of .*, 0"):
        setup.prepare(config, tmp_path / "run")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    path = sources.tokenizer_path("openmoji:en", ())
    (folder / "tokenizer.json").write_bytes(Path(path).read_bytes())
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<eos>", "eos_token": "<eos>"}')
    config.model.encoders.text.update(tokenizer=str(folder), pad_id=1)
    with pytest.raises(UserError, match="captioning could not learn where they end"):
        setup.prepare(config, tmp_path / "run")


def test_texts_alone_train_masked_modelling(tmp_path, openmoji_folder):
    config = config_of(6, texts={"inputs": ("text",)})
    config.model.fusion = configs.fusion(depth=1)
    config.objectives.masked = configs.objective(kind="masked", probability=0.5)
    lines = train(config, tmp_path)
    assert losses(lines, "masked")[-1] < losses(lines, "masked")[0]
    assert set(api.load(tmp_path).params) == {"text", "text_projection", "fusion", "logit_scale", "logit_bias"}


def test_images_alone_are_distilled_from_the_runs_own_average(tmp_path, openmoji_folder):
    config = config_of(images={"inputs": ("image",)})
    config.model.encoders.image.token_drop = 0.5
    config.objectives.distilled = configs.objective(kind="feature_distillation")
    config.teacher.source, config.train.ema_decay = "ema", 0.9
    found = losses(train(config, tmp_path), "distilled")
    assert min(found) > 0 and found[-1] < found[0]


def test_two_streams_feed_objectives_of_their_own(tmp_path, openmoji_folder):
    config = config_of(
        6,
        pairs={"objectives": ("contrastive", "masked"), "weight": 2.0},
        texts={"inputs": ("text",), "objectives": ("masked",), "batch_size": 8},
    )
    config.model.fusion = configs.fusion(depth=1)
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    config.objectives.masked = configs.objective(kind="masked", probability=0.5)
    lines = train(config, tmp_path)
    assert len(losses(lines, "contrastive")) == 4
    assert len(losses(lines, "masked")) == 6
    alone = [line for line in lines if "train/contrastive_loss" not in line]
    assert alone and all("train/masked_image_grad_norm" not in line for line in alone)
