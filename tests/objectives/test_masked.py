"""Masked language modelling: which tokens are hidden, how, and what rows without a text leave behind."""

import base64
import json
from functools import partial
from itertools import chain, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mmjax import config as configs
from mmjax.data import openmoji, text, words
from mmjax.models.multimodal import Text
from mmjax.models.outputs import Outputs, Vocabulary
from mmjax.objectives import masked
from tests.data.make_goldens_text import FOLDER, write
from tests.objectives import peer_cases as cases

SENTENCES = (
    "two small boats in the harbour",
    "supercalifragilistic foxes running",
    "an old astronaut reading newspapers",
)
LENGTH, ROWS = 40, 4000
choose = jax.jit(masked.choose_words, static_argnums=3)


def load(name, openmoji_folder, folder):
    """A tokenizer and what masking has to know of it."""
    if name == "openmoji":
        tokenizer = text.load(openmoji_folder / openmoji.tokenizer_name(["en"]))
    else:
        packed = json.loads((FOLDER / f"text_{name}.json").read_text())["files"]
        write({file: base64.b64decode(content) for file, content in packed.items()}, folder)
        tokenizer = text.load(folder if len(packed) > 1 else folder / next(iter(packed)))
    size = tokenizer.vocab_size + 1  # room for a mask token
    marks = np.pad(tokenizer.word_marks, (0, 1))
    special = np.isin(np.arange(size), [*tokenizer.special_ids, size - 1])
    mask_id = size - 1 if tokenizer.mask_id is None else tokenizer.mask_id
    return tokenizer, Vocabulary(mask_id, (marks & words.STARTS) > 0, (marks & words.ENDS) > 0, special)


def traced(vocabulary):
    """For use as an argument of a compiled function."""
    return Vocabulary(*map(jnp.asarray, vocabulary))


def word_places(tokenizer, sentence):
    """The places of each word's tokens: those that come with the word when the sentence is written up to it."""
    written, before = sentence.split(), int(tokenizer.start_id is not None)
    ids = [tokenizer.encode([" ".join(written[:count])], LENGTH)[0] for count in range(1, len(written) + 1)]
    ends = [before + int((~np.isin(row, tokenizer.special_ids)).sum()) for row in ids]
    return [list(range(first, last)) for first, last in zip([before, *ends], ends, strict=False)]


@pytest.mark.parametrize("name", ["openmoji", "bert", "clip", "gpt2", "t5"])
def test_the_tokens_of_a_word_are_hidden_together_and_special_tokens_never(name, openmoji_folder, tmp_path):
    tokenizer, vocabulary = load(name, openmoji_folder, tmp_path)
    several = 0
    for number, sentence in enumerate(SENTENCES):
        ids = np.repeat(tokenizer.encode([sentence], LENGTH), 40, axis=0)
        chosen = np.asarray(choose(jax.random.split(jax.random.key(number), 40), ids, traced(vocabulary), 0.5))
        places = word_places(tokenizer, sentence)
        assert not chosen[:, sorted({*range(LENGTH)} - {*chain(*places)})].any()
        for of_word in places:
            assert (chosen[:, of_word] == chosen[:, of_word[:1]]).all()
            several += len(of_word) > 1
        for one, next_one in pairwise(places):
            assert (chosen[:, one[0]] != chosen[:, next_one[0]]).any()  # words are drawn apart
    assert several >= 3


def test_how_many_are_chosen_and_what_becomes_of_them(openmoji_folder, tmp_path):
    tokenizer, vocabulary = load("bert", openmoji_folder, tmp_path)
    ids = np.repeat(tokenizer.encode(SENTENCES[:1], LENGTH), ROWS, axis=0)
    keys = jax.random.split(jax.random.key(0), ROWS)
    chosen = np.asarray(choose(keys, ids, traced(vocabulary), 0.15))
    first_tokens = [places[0] for places in word_places(tokenizer, SENTENCES[0])]
    np.testing.assert_allclose(chosen[:, first_tokens].mean(axis=0), 0.15, atol=0.025)
    assert chosen[:, first_tokens].mean() == pytest.approx(0.15, abs=0.01)
    hidden = np.asarray(
        jax.jit(lambda keys, ids, chosen: masked.hide(keys, ids, chosen, vocabulary))(keys, ids, chosen)
    )
    np.testing.assert_array_equal(hidden[~chosen], ids[~chosen])
    after, before = hidden[chosen], ids[chosen]
    assert (after == vocabulary.mask_id).mean() == pytest.approx(0.8, abs=0.015)
    assert (after == before).mean() == pytest.approx(0.1, abs=0.015)
    others = after[(after != vocabulary.mask_id) & (after != before)]
    assert others.size / after.size == pytest.approx(0.1, abs=0.015)
    assert not vocabulary.special[others].any()
    assert len(set(others)) > 0.7 * (~vocabulary.special).sum()


def test_a_row_is_masked_by_its_own_key_alone(openmoji_folder, tmp_path):
    tokenizer, vocabulary = load("bert", openmoji_folder, tmp_path)
    ids, keys = tokenizer.encode(SENTENCES, LENGTH), jax.random.split(jax.random.key(0), len(SENTENCES))

    def of(rows):
        chosen = masked.choose_words(keys[rows], ids[rows], vocabulary, 0.5)
        return chosen, masked.hide(keys[rows], ids[rows], chosen, vocabulary)

    for all_rows, some_rows in zip(of(np.arange(3)), of(np.array([2, 0])), strict=True):
        np.testing.assert_array_equal(all_rows[np.array([2, 0])], some_rows)


VOCABULARY = Vocabulary(cases.MASK, np.ones(cases.VOCAB, bool), np.zeros(cases.VOCAB, bool), np.arange(cases.VOCAB) < 4)
MODEL = cases.build(
    ("text", "fusion", "masked"),
    {"depth": 1, "mask_padding": True, "pooling": "mean", "projection": False},
    fusion=configs.fusion(depth=1),
)


def fill_in(module, ids, image):
    return module.predict(Text(ids, *module.tokens("text", ids)), image)


@pytest.fixture
def batch():
    return cases.texts_and_images(0) | {"rng": cases.keys()}


@pytest.fixture
def weights(mesh, batch):
    shapes = cases.shapes_of(MODEL, batch["text"], batch["image"], method=fill_in)
    return cases.as_tree(cases.draw_weights(shapes, 0))


@partial(jax.jit, static_argnums=(2, 3))
@partial(jax.value_and_grad, has_aux=True)
def run(weights, batch, probability=0.5, teacher_weight=0.0):
    """The teacher has the same weights."""
    known = {"image": {"tokens": batch["image"]}} if "image" in batch else {}
    teacher = Outputs(MODEL, weights, batch, known)
    outputs = Outputs(MODEL, weights, batch, known | {"teacher": teacher}, VOCABULARY)
    return masked.masked(outputs, batch, None, probability, teacher_weight)


def test_rows_without_a_text_leave_no_trace(weights, batch):
    missing = np.array([False, True, False, False, True, False])
    empty = batch | {"text": np.where(missing[:, None], cases.PAD, batch["text"]), "has_text": ~missing}
    with_them = run(weights, empty)
    cases.assert_close(with_them, run(weights, {name: value[~missing] for name, value in batch.items()}))
    assert with_them[0][1]["count"] > 2


def test_without_chosen_tokens_loss_and_gradient_are_zero(weights, batch):
    (loss, metrics), gradient = run(weights, batch | {"text": np.full_like(batch["text"], cases.PAD)})
    assert (loss, metrics["count"]) == (0, 0)
    assert not any(np.any(value) for value in jax.tree.leaves(gradient))


def test_the_image_is_read_where_there_is_one(weights, batch):
    (loss, _), gradient = run(weights, batch)
    (other, _), _ = run(weights, batch | {"image": -batch["image"]})
    assert abs(loss - other) > 1e-4
    text_alone = {name: value for name, value in batch.items() if name != "image"}
    (without, _), alone = run(weights, text_alone)
    assert np.isfinite(without) and abs(loss - without) > 1e-4
    for values, reads_image in ((gradient, True), (alone, False)):
        values = flatten_dict(values, sep="/")
        moved = [np.any(value) for path, value in values.items() if path.endswith("cross_attention/value/kernel")]
        assert moved == [reads_image]


def test_a_teacher_that_agrees_adds_its_entropy_and_no_gradient(weights, batch):
    (hard, _), gradient = run(weights, batch)
    (entropy, _), nothing = run(weights, batch, 0.5, 1.0)
    (mixed, _), part = run(weights, batch, 0.5, 0.4)
    assert float(mixed) == pytest.approx(float(0.6 * hard + 0.4 * entropy), rel=1e-5)
    cases.assert_close(part, jax.tree.map(lambda value: 0.6 * value, gradient))
    assert all(np.abs(value).max() < 1e-5 for value in jax.tree.leaves(nothing))
