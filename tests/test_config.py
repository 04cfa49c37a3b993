import importlib.util
from pathlib import Path

import pytest

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.validation import validate
from tests import tiny

# All but the one that needs a model to start from.
RECIPES = [path for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py")) if path.stem != "finetune"]


def load(path, *arguments):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    validate(load(path), 8)


def test_vit_b_is_the_published_siglip_recipe():
    config = load(RECIPES[0].parent / "vit_b.py")
    assert (config.model.logit_scale, config.model.logit_bias, config.optimizer.b2) == (10.0, -10.0, 0.95)
    assert (config.model.encoders.image.variant, config.model.encoders.image.image_size) == ("B/16", 224)
    assert (config.objectives.contrastive.kind, config.optimizer.schedule) == ("sigmoid", "cosine")


def mix(config, **weights):
    config.streams.train.source = ""
    config.streams.train.mixture = {name: configs.component(weight=weight) for name, weight in weights.items()}


def add_audio(config, **fields):
    config.model.encoders.audio = configs.audio_encoder(**{"projection": True} | fields)


MISTAKES = [
    (lambda c: c.optimizer.__setattr__("name", "adam"), 'config.optimizer.name: unknown "adam"; did you mean "adamw"?'),
    (lambda c: c.model.encoders.image.__setattr__("image_size", 30), "patch 14 does not divide 30 pixels"),
    (lambda c: c.model.encoders.image.__setattr__("heads", 5), "5 heads do not divide width 32"),
    (lambda c: c.model.encoders.text.__setattr__("variant", "XL"), 'unknown variant "XL"'.replace('"', "'")),
    (lambda c: c.model.encoders.text.__setattr__("pooling", "mena"), 'did you mean "mean"?'),
    (lambda c: c.streams.train.__setattr__("batch_size", 12), "config.streams.train.batch_size: 12 is not divisible"),
    (lambda c: c.streams.train.__setattr__("objectives", ("contrast",)), 'did you mean "contrastive"?'),
    (lambda c: c.mesh.__setattr__("tensor", 3), "mesh.tensor=3 does not divide the 8 device(s)"),
    (lambda c: c.train.__setattr__("epochs", 1.0), "set exactly one of steps, examples, epochs"),
    (lambda c: c.train.__setattr__("steps", -1), "set exactly one of steps, examples, epochs"),
    (lambda c: c.optimizer.__setattr__("rules", (("(", 1.0, 1.0),)), "config.optimizer.rules"),
    (lambda c: c.streams.train.preprocess.__setattr__("crop_min_area", 0.0), "crop_min_area: not in (0, 1]"),
    (lambda c: c.__setattr__("seed", -1), "config.seed: -1 is less than 0"),
    (lambda c: c.train.__setattr__("best_metric", "eval/nope/R@1"), '"eval/nope/R@1" is not eval/EVALUATOR/METRIC'),
    (lambda c: c.model.__setattr__("logit_scale", 0.0), "config.model.logit_scale: 0.0 is not positive"),
    (lambda c: c.streams.train.preprocess.__setattr__("resize", "crop"), 'did you mean "random_crop"?'),
    (lambda c: c.streams.train.preprocess.__setattr__("caption_choice", "cylce"), 'did you mean "cycle"?'),
    (lambda c: c.streams.train.preprocess.__setattr__("caption_weights", (1.0, 2.0)), "one for each of captions"),
    (lambda c: c.streams.train.preprocess.__setattr__("color_jitter", (0.4, 0.4)), "color_jitter: (0.4, 0.4) is not"),
    (lambda c: c.streams.train.preprocess.__setattr__("text_length", 9), "text_length: 9 is neither 0 nor between 2"),
    (lambda c: c.streams.train.__setattr__("source", ""), "set either source or mixture"),
    (lambda c: c.streams.train.mixture.__setattr__("a", configs.component()), "set either source or mixture"),
    (
        lambda c: c.streams.train.preprocess.__setattr__("color_jitter", (0.1, 0.1, "a", 0.0)),
        "color_jitter: (0.1, 0.1, 'a', 0.0) holds something else than numbers",
    ),
    (lambda c: c.streams.train.fields.__setattr__("captions", (1,)), "fields.captions: (1,) holds something else"),
    (lambda c: mix(c, a=0.0, b=2.0), "streams.train.mixture: give every component a weight, or none"),
    (lambda c: c.loader.__setattr__("max_broken_fraction", 1.5), "loader.max_broken_fraction: 1.5 is not in [0, 1]"),
    (lambda c: c.model.encoders.image.__setattr__("resize", "crop"), 'did you mean "center_crop"?'),
    (lambda c: c.model.encoders.image.__setattr__("resample", "cubic"), 'did you mean "bicubic"?'),
    (lambda c: c.model.encoders.image.__setattr__("crop_fraction", 0.0), "crop_fraction: 0.0 is not in (0, 1]"),
    (lambda c: c.evaluators.test.__setattr__("batch_size", 81), "config.evaluators.test.batch_size: 81"),
    (lambda c: c.objectives.contrastive.__setattr__("kind", "sigmod"), 'did you mean "sigmoid"?'),
    (lambda c: c.objectives.contrastive.__setattr__("chunk", -1), "config.objectives.contrastive.chunk: -1 is less"),
    (lambda c: c.model.encoders.image.__setattr__("token_drop", 1.0), "image.token_drop: 1.0 is not in [0, 1)"),
    (
        lambda c: (
            c.model.encoders.text.__setattr__("mask_padding", False),
            c.model.__setattr__("fusion", configs.fusion(depth=1, pooling="eos")),
            c.objectives.__setattr__("matching", configs.objective(kind="matching")),
        ),
        "model.fusion.pooling: eos needs encoders.text.mask_padding",
    ),
    (lambda c: add_audio(c, hop=0), "model.encoders.audio.hop: 0 is less than 1"),
    (lambda c: add_audio(c, pooling="eos"), "model.encoders.audio.pooling: a recording has no end token"),
    (lambda c: add_audio(c, mel=80), 'unknown key config.model.encoders.audio.mel; did you mean "mels"?'),
    (
        lambda c: c.model.__setattr__("decoder", configs.decoder(modality="audio")),
        "model.decoder.modality: no objective trains a decoder that reads audio",
    ),
    (
        lambda c: c.model.__setattr__("speech", configs.speech(suppress=("a",))),
        "model.speech.suppress: ('a',) holds something else than numbers",
    ),
]


@pytest.mark.parametrize("spoil, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_key(spoil, message):
    config = tiny.get_config()
    validate(config, 8)
    spoil(config)
    with pytest.raises(UserError) as error:
        validate(config, 8)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_and_mistyped_keys():
    config = tiny.get_config()
    config.optimizer.learning_rat = 1.0
    with pytest.raises(UserError, match='config.optimizer.learning_rat; did you mean "learning_rate"'):
        validate(config, 8)
    config = tiny.get_config()
    with config.ignore_type():
        config.optimizer.learning_rate = "fast"
    with pytest.raises(UserError, match="config.optimizer.learning_rate: expected float, got str 'fast'"):
        validate(config, 8)
    with pytest.raises(UserError, match='"optimzer"; did you mean "optimizer"'):
        configs.check_key(config, "optimzer.lr")
    with pytest.raises(UserError, match="config.seed has no keys below it"):
        configs.check_key(config, "seed.lr")


def test_a_saved_config_comes_back_equal():
    config = load(RECIPES[0])
    assert configs.from_plain(configs.to_plain(config)).to_dict() == config.to_dict()


def test_only_keys_that_change_the_result_count_as_another_config():
    old, new = configs.to_plain(tiny.get_config()), tiny.get_config()
    new.mesh.fsdp = 4
    new.streams.train.source = "array_record:/moved/to"
    new.streams.train.root = "/moved"
    new.loader.workers = 2
    new.train.log_every = 7
    new.objectives.contrastive.chunk = 8
    assert configs.differing_keys(old, configs.to_plain(new)) == []
    new.optimizer.b2 = 0.99
    new.seed = 3
    assert configs.differing_keys(old, configs.to_plain(new)) == ["optimizer.b2", "seed"]
