"""Captioning and matching through the API, of a model that has everything and of one that has nothing of it."""

from functools import cache

import jax
import numpy as np
import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.data import sources, text
from mmjax.errors import UserError
from mmjax.models.multimodal import Text
from mmjax.models.outputs import Outputs
from mmjax.objectives import captioning
from mmjax.sharding.mesh import make_mesh
from tests import tiny

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)
PROMPTS = ["", "a dog", "red", "the flag of", "woman running"]


def config_of(everything=True, **decoder):
    config = tiny.get_config()
    config.model.encoders.image.depth = config.model.encoders.text.depth = 1
    if everything:
        config.model.fusion, config.model.decoder = configs.fusion(depth=1), configs.decoder(depth=1, **decoder)
        config.model.encoders.text.causal = decoder.get("reads") == "text"
        config.objectives.matching = configs.objective(kind="matching")
        config.objectives.captioning = configs.objective(kind="captioning")
    return config


@cache
def model(devices=1, everything=True, **decoder):
    """Random parameters of one size; the tokenizer of the embedded data."""
    config, mesh = config_of(everything, **decoder), make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: api.init_params(config, api.make_module(config)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return api.Model(config, params, text.load(sources.tokenizer_path("openmoji:en", ())), mesh)


@pytest.mark.parametrize("options", [{}, {"beams": 2, "length_penalty": 0.5}, {"temperature": 1.0, "seed": 3}])
def test_captions_depend_neither_on_the_batch_nor_on_the_devices(openmoji_folder, options):
    """Those of sampling neither: what is drawn depends on the seed and the image's number."""
    one = model()
    expected = one.caption(IMAGES, PROMPTS, **options)
    load = one._loader(IMAGES)
    assert one.caption_rows(5, load, PROMPTS, batch_size=2, **options) == expected
    assert model(devices=8).caption_rows(5, load, PROMPTS, batch_size=8, **options) == expected
    assert all(caption.startswith(prompt) for caption, prompt in zip(expected, PROMPTS, strict=True))
    assert len(set(expected)) == 5 and all(map(str.__ne__, expected, PROMPTS))


def test_each_batch_draws_anew_and_each_seed(openmoji_folder):
    same = np.repeat(IMAGES[:1], 8, axis=0)
    captions = model().caption_rows(8, lambda rows: same[rows], batch_size=2, temperature=1.0)
    assert len(set(captions)) == 8
    assert not set(captions) & set(model().caption(same, temperature=1.0, seed=1))


def test_a_prompt_may_fill_the_text(openmoji_folder):
    """The words that no token is left for are cut off, and one token is left to choose."""
    long = "dog cat " * 10
    found = model().caption(IMAGES[:1], [long])[0]
    length = model().config.model.encoders.text.length
    assert long.startswith(model().tokenizer.decode(model().tokenizer.encode([found], length)[0][: length - 1]))


def test_matching_is_a_probability_for_each_pair(openmoji_folder):
    one, texts = model(), ["a dog", "a cat", "", "the flag of France", "x" * 300]
    found = one.match(IMAGES, texts)
    assert found.shape == (5,) and found.dtype == np.float32
    assert ((found > 0) & (found < 1)).all() and len(set(found.tolist())) == 5
    load, ids, rows = one._loader(IMAGES), one.tokenizer.encode(texts, 8), np.arange(5)
    arguments = rows, rows, load, lambda rows: ids[rows]
    odds = np.log(found / (1 - found))
    np.testing.assert_allclose(one.match_rows(*arguments, batch_size=2), odds, atol=1e-5)
    np.testing.assert_allclose(model(devices=8).match_rows(*arguments, batch_size=8), odds, atol=1e-5)
    loaded = []

    def counted(rows):
        loaded.extend(rows)
        return load(rows)

    # In any order, and more pairs of an image than a batch holds: it is loaded once.
    images, of = np.array([4, 0, 4, 4, 1, 0, 4]), np.array([4, 0, 1, 0, 1, 2, 2])
    many = one.match_rows(images, of, counted, lambda rows: ids[rows], batch_size=3)
    single = [one.match(IMAGES[[i]], [texts[t]])[0] for i, t in zip(images, of, strict=True)]
    np.testing.assert_allclose(1 / (1 + np.exp(-many)), single, atol=1e-5)
    assert sorted(loaded) == [0, 1, 4]
    assert one.match_rows(rows[:0], rows[:0], load, lambda rows: ids[rows]).shape == (0,)
    swapped = one.match(IMAGES[[1, 0]], texts[:2])
    assert np.abs(swapped - found[:2]).min() > 1e-4
    with jax.set_mesh(one.mesh):
        both = {
            name: one.module.apply({"params": one.params}, name, inputs, method="tokens")
            for name, inputs in (("image", IMAGES), ("text", ids))
        }
        logits = one.module.apply({"params": one.params}, Text(ids, *both["text"]), both["image"][0], method="match")
    np.testing.assert_allclose(found, 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), atol=1e-5)


TEXTS = ["a dog", "a cat", "", "the flag of France", "x" * 300]


@pytest.mark.parametrize("decoder", [{}, {"reads": "text", "start": False}])
def test_the_likelihood_of_captions_is_what_training_minimises(openmoji_folder, decoder):
    one = model(**decoder)
    ids, load, rows = one.tokenizer.encode(TEXTS, 8), one._loader(IMAGES), np.arange(5)
    arguments = rows, rows, load, lambda rows: ids[rows]
    found = one.caption_likelihood_rows(*arguments)
    assert found.shape == (5, 8) and found.dtype == np.float32
    given = 0 if decoder.get("start", True) else 1  # the first token stands where a start token would
    assert (found[:, :given] == 0).all()
    np.testing.assert_array_equal(found[:, given:] != 0, ids[:, given:] != one.tokenizer.pad_id)
    with jax.set_mesh(one.mesh):
        batch = {"image": IMAGES, "text": ids}
        loss, metrics = captioning.captioning(Outputs(one.module, one.params, batch), batch, None)
    assert -found.sum() / metrics["count"] == pytest.approx(float(loss), rel=1e-5)
    assert (found != 0).sum() == metrics["count"]
    np.testing.assert_allclose(one.caption_likelihood_rows(*arguments, batch_size=2), found, atol=1e-5)
    np.testing.assert_allclose(model(8, **decoder).caption_likelihood_rows(*arguments, batch_size=8), found, atol=1e-5)


def test_likelihoods_of_an_image_and_its_captions_in_any_order(openmoji_folder):
    one, loaded = model(), []
    load, ids = one._loader(IMAGES), one.tokenizer.encode(TEXTS, 8)

    def counted(rows):
        loaded.extend(rows)
        return load(rows)

    images, texts = np.array([4, 0, 4, 4, 1, 0, 4]), np.array([4, 0, 1, 0, 1, 3, 3])
    found = one.caption_likelihood_rows(images, texts, counted, lambda rows: ids[rows], batch_size=3)
    assert sorted(loaded) == [0, 1, 4]  # each once, however many captions it has
    for row, pair in enumerate(zip(images, texts, strict=True)):
        alone = one.caption_likelihood_rows(*np.array([pair]).T, load, lambda rows: ids[rows], batch_size=3)
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)
    assert len(set(found.sum(axis=1).tolist())) == 7
    assert one.caption_likelihood_rows(images[:0], texts[:0], load, lambda rows: ids[rows]).shape == (0, 8)


def test_of_nothing_there_are_no_captions_and_no_matches(openmoji_folder):
    assert model().caption([]) == model().caption([], [], beams=2) == []
    assert model().match([], []).shape == (0,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beam": 2}, 'unknown option beam; did you mean "beams"?'),
        ({"beams": 0}, "beams is at least 1"),
        ({"temperature": -1.0}, "temperature and top_k are not negative"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p is in \(0, 1\]"),
        ({"beams": 2, "temperature": 1.0}, "leave out beams or temperature"),
        ({"top_k": 5}, "temperature 0 draws nothing"),
        ({"prompts": ["a", "b"]}, "5 images and 2 prompts"),
        ({"prompts": []}, "5 images and 0 prompts"),
    ],
)
def test_what_cannot_be_is_refused(openmoji_folder, options, message):
    with pytest.raises(UserError, match=message):
        model().caption(IMAGES, **options)


def test_pairs_come_in_pairs(openmoji_folder):
    with pytest.raises(UserError, match="5 images and 1 texts are no pairs"):
        model().match(IMAGES, ["a dog"])


def test_a_model_without_these_parts_says_so(openmoji_folder):
    plain = model(everything=False)
    with pytest.raises(UserError, match="cannot caption images: none of its objectives trains that"):
        plain.caption(IMAGES)
    with pytest.raises(UserError, match="cannot caption images"):
        plain.caption_likelihood_rows(*[np.arange(1)] * 2, plain._loader(IMAGES), lambda rows: rows)
    with pytest.raises(UserError, match="cannot match images and texts"):
        plain.match(IMAGES[:1], ["a dog"])


def test_a_decoder_that_needs_a_start_token_of_the_tokenizer_says_so(openmoji_folder):
    one = model()
    config = one.config.copy_and_resolve_references()
    config.model.decoder.start = False
    with pytest.raises(UserError, match="the tokenizer has no start token"):
        api.Model(config, {}, one.tokenizer, one.mesh).caption(IMAGES)


def test_one_in_is_one_out(openmoji_folder):
    one = model()
    image, text = one.encode_image(IMAGES[0]), one.encode_text("a dog")
    np.testing.assert_allclose(image, one.encode_image(IMAGES[:1])[0], rtol=1e-6)
    np.testing.assert_allclose(text, one.encode_text(["a dog"])[0], rtol=1e-6)
    assert image.shape == text.shape == (16,) and one.similarity(image, text).shape == (1, 1)
    assert one.caption(IMAGES[0], "red") == one.caption(IMAGES[:1], ["red"])[0]
    assert one.match(IMAGES[0], "a dog") == pytest.approx(one.match(IMAGES[:1], ["a dog"])[0], rel=1e-5)
    with pytest.raises(UserError, match="one image goes with one text"):
        one.match(IMAGES, "a dog")
