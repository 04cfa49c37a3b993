"""Every recipe runs, in each of its sizes; what a config lacks is said before anything is compiled."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from mmjax import api, cli, recipes
from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.training import loop
from mmjax.training.feedback import read_metrics
from mmjax.validation import validate
from tests.interop import folders
from tests.interop.test_clip import settings_with
from tests.programs import ROOT

SMALL = ("clip_b", "siglip_b", "coca_b", "cappa_b", "albef_b", "lit_b", "distill_b")
SLOW = ("coca_b", "albef_b", "distill_b")
PARTS = {
    "coca_b": {"image", "text", "decoder"},
    "cappa_b": {"image", "decoder"},
    "albef_b": {"image", "text", "fusion", "matching", "masked"},
}


def load(recipe, argument=""):
    return cli.load_recipe(str(ROOT / "configs" / f"{recipe}.py") + (f":{argument}" if argument else ""))


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW), id=name) for name in SMALL]
)
def test_smoke_trains_to_its_end(recipe, tmp_path, openmoji_folder):
    config = load(recipe, "smoke")
    assert loop.train(config, tmp_path) == 0
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert np.isfinite(line["train/loss"]) and line["train/grad_norm"] > 0 and not line["train/skipped_steps"]
        assert {f"train/{name}_loss" for name in config.objectives} <= line.keys()
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 4


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("size", ["quickstart", "smoke"])
def test_sizes_are_valid_and_have_the_same_objectives(recipe, size):
    config = load(recipe, size)
    validate(config, 8)
    assert config.train.steps == {"quickstart": 600, "smoke": 4}[size]
    assert config.objectives.to_dict() == load(recipe).objectives.to_dict()
    quickstart = load("quickstart")
    if size == "quickstart":
        assert config.streams.to_dict() == quickstart.streams.to_dict()
        assert {**config.optimizer, "rules": ()} == {**quickstart.optimizer, "rules": ()}


def test_every_recipe_of_a_paper_is_among_these():
    found = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert found == {*SMALL, "quickstart", "flickr8k", "vit_b", "finetune"}


def test_an_unknown_argument_names_what_there_is():
    with pytest.raises(UserError, match=r'configs/lit_b.py: unknown argument "quick"; known: .* init=WORKDIR'):
        load("lit_b", "quick")
    with pytest.raises(UserError, match=r'configs/clip_b.py: unknown argument "init=runs/a"; known: quickstart, smoke'):
        load("clip_b", "smoke,init=runs/a")
    with pytest.raises(UserError, match='unknown argument ""'):
        recipes.parse("clip_b", "")


def test_options_go_with_a_size():
    assert load("distill_b", "quickstart,teacher=runs/a").teacher.source == "runs/a"
    assert load("lit_b", "init=runs/b").init_from.image.source == "runs/b"


@pytest.mark.parametrize("recipe", SMALL)
def test_only_what_the_objectives_read_is_built(recipe, mesh):
    config = load(recipe, "smoke")
    module = api.make_module(config)
    expected = PARTS.get(recipe, {"image", "text"})
    assert set(module.parts) == expected
    params = jax.eval_shape(partial(api.init_params, config, module))
    built = {name.removesuffix("_projection") for name in params} - {"logit_scale", "logit_bias"}
    assert built == expected - {"matching", "masked"}  # the two heads of the fusion
    if recipe == "albef_b":
        assert {"match_head", "token_head"} <= params["fusion"].keys()
    if recipe in ("cappa_b", "lit_b"):
        assert "image_projection" not in params


@pytest.mark.parametrize("size, source", [("", "siglip_b"), ("quickstart", "quickstart")])
def test_what_a_recipe_takes_from_another_run_fits_by_default(size, source, mesh):
    def image_tower(config):
        return jax.eval_shape(partial(api.init_params, config, api.make_module(config)))["image"]

    lit, distill, other = load("lit_b", size), load("distill_b", size), load(source)
    assert lit.init_from.image.source == distill.teacher.source == f"runs/{source}"
    assert image_tower(lit) == image_tower(other)
    assert distill.model.embed_dim == other.model.embed_dim


@pytest.mark.parametrize("recipe, part", [("coca_b", "decoder"), ("cappa_b", "decoder"), ("albef_b", "fusion")])
def test_an_objective_whose_part_is_missing_is_an_error_that_names_it(recipe, part):
    config = load(recipe, "smoke")
    config.model[part] = {}
    with pytest.raises(UserError, match=rf"config\.objectives\.\w+: \w+ needs config\.model\.{part}, which is empty"):
        validate(config, 1)


@pytest.mark.parametrize("inputs, missing", [(("image",), "text"), (("text",), "image")])
def test_a_stream_without_an_objectives_input_is_an_error(inputs, missing):
    config = load("clip_b", "smoke")
    config.streams.train.inputs = inputs
    with pytest.raises(UserError, match=f"config.streams.train.objectives: contrastive needs {missing}"):
        validate(config, 1)


def test_a_stream_of_texts_may_feed_masked_words_alone():
    config = load("albef_b", "smoke")
    config.streams.texts = configs.stream(inputs=("text",), objectives=("masked",), batch_size=16)
    validate(config, 1)


def test_a_teacher_is_missing_or_needs_a_moving_average():
    config = load("distill_b", "smoke")
    config.train.ema_decay = 0.0
    with pytest.raises(UserError, match="config.teacher.source: ema needs config.train.ema_decay"):
        validate(config, 1)
    config.teacher.source = ""
    with pytest.raises(UserError, match="config.teacher.source: an objective reads a teacher"):
        validate(config, 1)


def test_matching_needs_embeddings_that_mean_something():
    config = load("albef_b", "quickstart")
    for name in ("contrastive", "distillation"):
        del config.objectives[name]
    with pytest.raises(UserError, match="config.objectives.matching: it draws wrong pairs by .* nothing trains"):
        validate(config, 1)
    config.init_from.run = configs.init_from(source="runs/quickstart")
    validate(config, 1)


def test_an_evaluator_needs_what_an_objective_trains():
    config = load("cappa_b", "quickstart")
    config.evaluators.test = configs.retrieval()
    with pytest.raises(UserError, match="config.evaluators.test: no objective trains what it needs: text"):
        validate(config, 1)
    config = load("clip_b", "quickstart")
    config.evaluators.test.rerank = 10
    with pytest.raises(UserError, match="config.evaluators.test: no objective trains what it needs: matching"):
        validate(config, 1)
    config.evaluators.test = configs.matching()
    with pytest.raises(UserError, match="config.evaluators.test: no objective trains what it needs: matching"):
        validate(config, 1)
    config.evaluators.test = configs.compositional(by="matching")
    with pytest.raises(UserError, match="config.evaluators.test: no objective trains what it needs: matching"):
        validate(config, 1)
    config.evaluators.test.by = "cosine"
    validate(config, 1)
    config = load("albef_b", "quickstart")
    config.evaluators = {"pairs": configs.matching(hard=True), "foils": configs.compositional(by="matching")}
    validate(config, 1)
    config.evaluators.foils.by = "cosin"
    with pytest.raises(UserError, match='config.evaluators.foils.by: unknown "cosin"; did you mean "cosine"'):
        validate(config, 1)
    config.evaluators = {"pairs": configs.matching(seed=-1)}
    with pytest.raises(UserError, match="config.evaluators.pairs.seed: -1 is less than 0"):
        validate(config, 1)


def test_finetuning_takes_the_model_its_tokenizer_and_its_loss(tmp_path):
    folder = folders.write(tmp_path / "clip", "clip", settings_with("gelu"))
    config = load("finetune", str(folder))
    assert config.model == api.load_config(folder).model and config.objectives.contrastive.kind == "softmax"
    assert config.init_from.pretrained.source == str(folder) and not config.init_from.pretrained.parts
    with pytest.raises(UserError, match="configs/finetune.py: name the model to start from"):
        load("finetune")
