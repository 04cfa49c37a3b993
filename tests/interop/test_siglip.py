"""SigLIP and SigLIP 2: the results of transformers that make_goldens_siglip.py stored, and images of any shape."""

import base64
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmjax import api
from mmjax import config as configs
from mmjax.data import text
from mmjax.data.image_reader import Reader, fitting_grid
from mmjax.errors import UserError
from mmjax.evaluators import EVALUATORS
from mmjax.interop import pretrained
from mmjax.models import position
from mmjax.training.init_from import taken_over
from mmjax.validation import validate
from tests import tiny
from tests.data.make_goldens_image import picture
from tests.interop import folders

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = TOWER | {"vocab_size": 40, "max_position_embeddings": 6}
SETTINGS = {
    "siglip": {"vision_config": TOWER | {"image_size": 8, "patch_size": 4}, "text_config": TEXT},
    "siglip2": {"vision_config": TOWER | {"patch_size": 4, "num_patches": 9}, "text_config": TEXT},
}
PROCESSORS = {"siglip": {}, "siglip2": {"patch_size": 4, "max_num_patches": 30}}
SHAPES = ((50, 80), (97, 33), (8, 8), (4, 700))  # of pictures: a row of patches is the last
# Height, width, patch, patches: what is asked of `fitting_grid`.
SIZES = (
    (480, 640, 16, 256), (640, 480, 16, 256), (1, 1, 16, 256), (3, 5000, 16, 256), (5000, 3, 16, 256),
    (224, 224, 16, 256), (256, 256, 16, 256), (375, 500, 16, 784), (1000, 1001, 14, 729), (31, 57, 16, 1024),
)  # fmt: skip


def pictures():
    return [picture(height, width) for height, width in SHAPES]


def ids():
    return np.random.default_rng(1).integers(0, 40, (len(SHAPES), 6)).astype(np.int32)


def load(folder, kind, **text_settings):
    settings = {"model_type": kind, **SETTINGS[kind], "text_config": TEXT | text_settings}
    return api.load(folders.write(folder, kind, settings, preprocessor_config=PROCESSORS[kind]))


def inputs_of(kind, model):
    """The images that the goldens are of."""
    return folders.pixels(4, 8) if kind == "siglip" else Reader.of(model.config.model.encoders.image)(pictures())


def encoded(model, images):
    """Embeddings of rows that are read already, and of the ids."""
    image = model.encode_rows("image", 4, lambda rows: jax.tree.map(lambda values: values[rows], images), 8)
    return image, model.encode_rows("text", 4, lambda rows: ids()[rows], 8)


@pytest.mark.parametrize("kind", SETTINGS)
def test_features_are_those_of_transformers(kind, tmp_path):
    wanted, model = np.load(folders.GOLDENS / "siglip.npz"), load(tmp_path, kind)
    image, text = encoded(model, inputs_of(kind, model))
    assert folders.relative_error(image, wanted[f"{kind}_image"]) < 1e-4
    assert folders.relative_error(text, wanted[f"{kind}_text"]) < 1e-4
    np.testing.assert_allclose(model.similarity(image, text), wanted[f"{kind}_probabilities"], rtol=1e-4)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_export_is_the_same_model(kind, tmp_path):
    model = load(tmp_path / "in", kind)
    assert pretrained.save(tmp_path / "out", model.config, model.params, None) == kind
    folders.assert_same_tensors(tmp_path / "in", tmp_path / "out")
    assert api.load(tmp_path / "out").config.to_dict() == model.config.to_dict()


def test_grids_are_those_of_transformers():
    wanted = np.load(folders.GOLDENS / "siglip.npz")["grids"]
    np.testing.assert_array_equal([fitting_grid(*size) for size in SIZES], wanted)


def test_patches_are_those_of_transformers():
    wanted = np.load(folders.GOLDENS / "siglip.npz")
    found = Reader(0, resample="bilinear", max_patches=30, patch=4)(pictures())
    np.testing.assert_array_equal(found["shape"], wanted["shape"])
    np.testing.assert_array_equal(found["patches"], wanted["patches"])


def test_positions_are_those_of_torch():
    wanted = np.load(folders.GOLDENS / "siglip.npz")
    shapes = [(2, 9), (3, 3), (1, 30), (5, 6), (30, 1)]
    found = position.resize_each(wanted["table"], (5, 5), jnp.array(shapes), 30)
    for row, (rows, columns) in zip(found, shapes, strict=True):
        expected = wanted[f"table_{rows}x{columns}"]
        np.testing.assert_allclose(row[: rows * columns], expected, atol=1e-5)
        assert np.isfinite(row).all()


def test_one_program_encodes_images_of_all_shapes(tmp_path):
    model = load(tmp_path, "siglip2")
    one = [model.encode_image([each]) for each in pictures()]
    assert model._encode._cache_size() == 1
    np.testing.assert_allclose(model.encode_image(pictures()), np.concatenate(one), atol=1e-6)
    assert model._encode._cache_size() == 1


def test_padding_is_not_seen(tmp_path):
    model = load(tmp_path, "siglip2")
    clean = inputs_of("siglip2", model)
    counts = clean["shape"].prod(axis=1)
    assert (counts < 30).any()
    noisy = clean | {"patches": clean["patches"].copy()}
    for row, count in enumerate(counts):
        noisy["patches"][row, count:] = 200
    np.testing.assert_array_equal(encoded(model, noisy)[0], encoded(model, clean)[0])


def test_at_the_size_of_training_it_is_a_model_for_one_size(tmp_path):
    model = load(tmp_path, "siglip2")
    model.config.model.encoders.image.max_patches = 9
    flexible = api.Model(model.config, model.params, None, model.mesh)
    config = model.config.copy_and_resolve_references()
    config.model.encoders.image.max_patches = 0
    fixed, images = api.Model(config, model.params, None, model.mesh), list(folders.pixels(4, 12))
    np.testing.assert_allclose(flexible.encode_image(images), fixed.encode_image(images), atol=1e-6)


def test_a_run_on_images_of_one_size_starts_from_a_model_for_any_shape(tmp_path, mesh):
    model = load(tmp_path, "siglip2")
    config = model.config.copy_and_resolve_references()
    config.model.encoders.image.update(max_patches=0, image_size=16)
    config.init_from.first = configs.init_from(source=str(tmp_path))
    taken = taken_over(config, pretrained.shapes_of(config, mesh), mesh)
    assert "resized: image/positions/position [9, 16] to [16, 16]" in taken.report[0]
    kernel = model.params["image"]["patches"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(taken.params["image/patches/patch_embed/kernel"], kernel)


def test_images_keep_their_shape(tmp_path):
    """A picture and the same one turned on its side have grids that are turned, and other embeddings."""
    model = load(tmp_path, "siglip2")
    upright = picture(40, 90)
    shapes = Reader.of(model.config.model.encoders.image)([upright, upright.swapaxes(0, 1)])["shape"]
    assert shapes[0].tolist() == shapes[1][::-1].tolist() and shapes[0, 0] < shapes[0, 1]


def test_images_of_any_shape_are_not_trained_on():
    config = tiny.get_config()
    config.model.encoders.image.max_patches = 16
    with pytest.raises(UserError, match="config.model.encoders.image.max_patches: images of any shape cannot be"):
        validate(config, 1)


def test_a_large_logit_scale_is_kept_or_bounded_as_the_config_says(tmp_path):
    model = load(tmp_path / "in", "siglip")
    params = model.params | {"logit_scale": jnp.float32(np.log(112.7))}
    assert api.Model(model.config, params, None, model.mesh).logits()["logit_scale"] == pytest.approx(112.7)
    model.config.model.max_logit_scale = 100.0
    assert api.Model(model.config, params, None, model.mesh).logits()["logit_scale"] == pytest.approx(100)
    pretrained.save(tmp_path / "out", model.config, params, None, "siglip")
    assert folders.tensors_of(tmp_path / "out")["logit_scale"] == pytest.approx(np.log(100))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("siglip", {"vision_config": {"vision_use_head": False}}, "vision_use_head is off"),
        ("siglip", {"text_config": {"projection_size": 8}}, "embedded in 16 dimensions, texts in 8"),
        ("siglip2", {"vision_config": {"num_patches": 10}}, "num_patches 10 is no square"),
        ("siglip2", {"vision_config": {"patch_size": 8}}, "patches of 4 pixels for a model of 8"),
    ],
)
def test_settings_that_we_have_no_model_for_are_named(kind, change, message, tmp_path):
    settings = {"model_type": kind} | {name: tower | change.get(name, {}) for name, tower in SETTINGS[kind].items()}
    with pytest.raises(UserError, match=message):
        folders.write(tmp_path, kind, settings, preprocessor_config=PROCESSORS[kind])


def test_a_model_of_one_resolution_is_no_siglip2(tmp_path):
    model = load(tmp_path / "in", "siglip")
    with pytest.raises(
        UserError, match="no model of the family siglip2: model.encoders.image.max_patches is 0 and not 256$"
    ):
        pretrained.save(tmp_path / "out", model.config, model.params, None, "siglip2")


def write_tokenizer(folder, **settings):
    """The sentencepiece model of SigLIP's class that the goldens of texts are of."""
    packed = json.loads((Path(text.__file__).parents[2] / "tests/data/goldens/text_siglip.json").read_text())["files"]
    for name, content in packed.items():
        (folder / name).write_bytes(base64.b64decode(content))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return text.load(folder)


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"tokenizer_class": "T5Tokenizer"}], ids=str)
def test_a_sentencepiece_tokenizer_is_exported_with_its_class(settings, tmp_path):
    model = load(tmp_path / "in", "siglip")
    tokenizer = write_tokenizer(tmp_path / "in", **settings)
    pretrained.save(tmp_path / "out", model.config, model.params, tokenizer)
    assert (tmp_path / "out" / "spiece.model").read_bytes() == (tmp_path / "in" / "spiece.model").read_bytes()
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == settings.get("tokenizer_class", "SiglipTokenizer")
    assert written.get("do_lower_case") == {"T5Tokenizer": None}.get(written["tokenizer_class"], not settings)
    assert (written["eos_token"], written["unk_token"], written["model_max_length"]) == ("</s>", "<unk>", 6)
    sentences = ["A Fox, and a dog!", "ＦＵＬＬ  width", ""]
    again = api.load(tmp_path / "out").tokenizer
    np.testing.assert_array_equal(again.encode(sentences, 20), tokenizer.encode(sentences, 20))
    assert again.to_json() == tokenizer.to_json()


def test_a_sentencepiece_tokenizer_that_no_class_reads_is_refused_before_anything_is_written(tmp_path):
    model = load(tmp_path / "in", "siglip")
    write_tokenizer(tmp_path / "in")
    bare = text.SentencePieceTokenizer((tmp_path / "in" / "spiece.model").read_bytes(), offset=1, layout=text.Layout(0))
    with pytest.raises(UserError, match="no class of transformers gives the same ids"):
        pretrained.save(tmp_path / "out", model.config, model.params, bare)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["retrieval", "zeroshot"])
def test_evaluators_read_images_of_any_shape(kind, tmp_path):
    model = load(tmp_path / "model", "siglip2", vocab_size=300)
    model = api.Model(model.config, model.params, write_tokenizer(tmp_path), model.mesh)
    names = ["a red fox", "the lazy dog", "two small boats", "a green hat"]
    for name, pixels in zip(names, pictures(), strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = [{"filepath": f"{name}.png", "caption": name} for name in names]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry = getattr(configs, kind)(source=f"jsonl:{tmp_path / 'list.jsonl'}", split="train", batch_size=8)
    if kind == "zeroshot":
        (tmp_path / "templates.txt").write_text("{}")
        entry.templates = str(tmp_path / "templates.txt")
    evaluator = EVALUATORS[kind](entry)
    evaluator.open()
    found = dict(evaluator.evaluate(model))
    scores = model.encode_image(pictures()) @ model.encode_text(names).T
    assert "unreadable_images" not in found
    if kind == "retrieval":
        assert found["image_to_text_mean_rank"] == np.mean(1 + (scores > np.diag(scores)[:, None]).sum(axis=1))
        assert found["text_to_image_mean_rank"] == np.mean(1 + (scores > np.diag(scores)).sum(axis=0))
    else:
        assert found["zeroshot_top1"] == np.mean(scores.argmax(axis=1) == np.arange(4))


def test_robustness_and_explanations_want_images_of_one_size(tmp_path):
    from mmjax import explain

    model = load(tmp_path, "siglip2")
    with pytest.raises(UserError, match="robustness corrupts images of one size"):
        list(EVALUATORS["robustness"](configs.robustness()).evaluate(model))
    with pytest.raises(UserError, match="of any shape cannot be explained"):
        explain._views(model, pictures(), keep_shape=False)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_processor_may_lie_in_the_file_of_all_and_say_nothing(kind, tmp_path):
    """As `AutoProcessor.save_pretrained` writes it, with null for what its class decides."""
    model = load(tmp_path, kind)
    (tmp_path / "preprocessor_config.json").unlink()
    own = PROCESSORS[kind] | {"image_mean": [0.4, 0.5, 0.6], "size": None, "crop_size": None, "do_center_crop": None}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    image = api.load(tmp_path).config.model.encoders.image
    assert image.mean == (0.4, 0.5, 0.6)
    assert image.to_dict() == model.config.model.encoders.image.to_dict() | {"mean": image.mean}


def test_the_recipe_can_be_exported():
    from configs import siglip_b, vit_b

    for recipe in (siglip_b, vit_b):
        config = recipe.get_config()
        assert pretrained._fitting(config, "").name == "siglip"


def test_the_defaults_are_siglip_base(tmp_path):
    """A config.json that says nothing is google/siglip-base-patch16-224, and that is the recipe's architecture."""
    config = folders.FAMILIES["siglip"].to_config({"model_type": "siglip"}, {})
    image, text = config.model.encoders.image, config.model.encoders.text
    assert (image.width, image.depth, image.image_size, image.variant) == (768, 12, 224, "B/16")
    assert (text.width, text.length, text.vocab_size, config.model.embed_dim) == (768, 64, 32_000, 768)
    assert isinstance(config, type(configs.default()))
