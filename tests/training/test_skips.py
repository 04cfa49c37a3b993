"""Whole runs in which some steps explode."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data import pipeline
from mmjax.errors import UserError
from mmjax.objectives import OBJECTIVES
from mmjax.training import loop, setup
from mmjax.training.checkpoint import Checkpoints, saved_steps
from mmjax.training.feedback import read_metrics
from tests import tiny

STEPS = 12


def config_of(**health):
    config = tiny.get_config(STEPS)
    config.evaluators = {}
    config.health.update(health)
    return config


@pytest.fixture
def explode(tmp_path, monkeypatch, openmoji_folder):
    """A function that makes the loss of the given steps NaN, which it tells by the sum of their tokens."""
    run = setup.prepare(config_of(), tmp_path / "prepared")
    batches = pipeline.train_batches(run.config, run.sources, run.tokenizer, run.rows, 0, STEPS)
    sums = [int(batch["text"].sum()) for _, batch, _ in batches]
    assert len(set(sums)) == STEPS
    original = OBJECTIVES["sigmoid"]

    def choose(*steps):
        bad = np.array([sums[step - 1] for step in steps])

        def exploding(outputs, batch, *rest, **options):
            loss, metrics = original.run(outputs, batch, *rest, **options)
            return jnp.where(jnp.isin(batch["text"].sum(), bad), jnp.nan, loss), metrics

        monkeypatch.setitem(OBJECTIVES, "sigmoid", original._replace(run=exploding))

    return choose


def losses(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_run_survives_skipped_steps_and_counts_them(tmp_path, explode):
    explode(4, 5, 9)
    assert loop.train(config_of(max_skipped_in_a_row=3), tmp_path) == 0
    assert [step for step, loss in losses(tmp_path).items() if not np.isfinite(loss)] == [4, 5, 9]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["train/skipped_steps"] == 3


@pytest.mark.parametrize("log_every", [1, 50])
def test_too_many_in_a_row_stop_the_run_and_the_records_are_named(tmp_path, explode, log_every):
    explode(5, 6, 7)
    config = config_of(max_skipped_in_a_row=3)
    config.train.log_every, config.train.checkpoint_every = log_every, 4
    with pytest.raises(UserError, match=r"in 3 steps in a row \(up to step 7\); .*skipped_steps_00000005_00000007"):
        loop.train(config, tmp_path)
    assert saved_steps(tmp_path) == [4]
    steps = json.loads((tmp_path / "skipped_steps_00000005_00000007.json").read_text())
    assert [step["step"] for step in steps] == [5, 6, 7]
    # What is named is what was trained on.
    run = setup.prepare(config, tmp_path)
    batches = list(pipeline.train_batches(config, run.sources, run.tokenizer, run.rows, 4, 7))
    for step, (_, batch, _) in zip(steps, batches, strict=True):
        source = run.sources[step["stream"]][""]
        captions = [pipeline.captions_of(source[record["index"]])[0] for record in step["records"]]
        assert [record["key"] for record in step["records"]] == [source[r["index"]]["key"] for r in step["records"]]
        np.testing.assert_array_equal(run.tokenizer.encode(captions, batch["text"].shape[1]), batch["text"])


def test_it_goes_back_to_the_checkpoint_before_them(tmp_path, explode, capsys):
    explode(5, 6, 7)
    config = config_of(max_skipped_in_a_row=2, rollbacks=2)
    config.train.checkpoint_every = 3
    assert loop.train(config, tmp_path) == 0
    assert "going on from the parameters of step 3" in capsys.readouterr().err
    run = setup.prepare(config, tmp_path)
    with jax.set_mesh(run.mesh), Checkpoints(tmp_path, config, read_only=True) as checkpoints:
        state = checkpoints.restore(STEPS, run.target)
    # Steps 1 to 3, which the checkpoint holds, and 8 to 12: step 4 was taken back.
    assert int(state.health.accepted) == 8 and int(state.health.rollbacks) == 1
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == STEPS and last["train/skipped_steps"] == 3 and np.isfinite(last["train/loss"])


def test_it_stops_when_it_went_back_as_often_as_it_may(tmp_path, explode):
    explode(5, 6, 8, 9, 10, 11)
    config = config_of(max_skipped_in_a_row=2, rollbacks=1)
    config.train.checkpoint_every = 4
    with pytest.raises(UserError, match="in 2 steps in a row"):
        loop.train(config, tmp_path)


def test_without_an_earlier_checkpoint_there_is_nothing_to_go_back_to(tmp_path, explode):
    explode(2, 3)
    config = config_of(max_skipped_in_a_row=2, rollbacks=1)
    config.train.checkpoint_every = 100
    with pytest.raises(UserError, match="no intact checkpoint from before them"):
        loop.train(config, tmp_path)
