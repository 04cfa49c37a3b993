"""Generation against plain loops over logits that are computed without a cache."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.models.generate import GREEDY, Strategy, generate, kept_logits, penalty
from mmjax.sharding.mesh import make_mesh
from tests.models import captioners
from tests.models.captioners import END, PAD

VARIANTS = [{}, {"reads": "text", "image": "prefix", "start": False, "norm": "post"}, {"reads": "text"}]


@cache
def compiled(module, strategy=GREEDY, end_id=END):
    """`generate(params, image, prompt, prompt_length, keys)`."""

    def run(params, image, prompt, prompt_length, keys):
        return generate(module, params, image, prompt, prompt_length, keys, end_id, strategy)

    return jax.jit(run)


@cache
def searching(module, beams):
    """The same with beams; the length penalty comes last."""

    def run(params, image, prompt, prompt_length, keys, power):
        return generate(module, params, image, prompt, prompt_length, keys, END, Strategy(beams, power))

    return jax.jit(run)


def arguments(module, rows, seed=0, longest=3, size=0.6):
    """Parameters, images, prompts of 0 (or 1) to `longest` tokens, and keys."""
    text = module.config["encoders"]["text"]
    rng = np.random.default_rng(seed)
    prompt = rng.integers(2, text["vocab_size"], (rows, text["length"]), np.int32)
    least = 0 if module.config["decoder"]["start"] else 1
    params = captioners.parameters(module, seed, size)
    image = captioners.image_tokens(rows, seed)
    return params, image, prompt, np.int32(np.arange(rows) % (longest + 1 - least) + least), keys(rows, seed)


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def greedy(module, params, image, prompt, prompt_length):
    """Each next token is the likeliest after all that are there, computed anew."""
    ids, length = np.array(prompt), prompt.shape[1]
    finished = np.zeros(len(ids), bool)
    for place in range(0 if module.config["decoder"]["start"] else 1, length):
        free = place >= prompt_length
        ids[:, place] = np.where(finished, PAD, ids[:, place])
        best = captioners.log_probabilities(module, params, image, ids)[:, place].argmax(axis=1)
        ids[:, place] = np.where(free & ~finished, best, ids[:, place])
        finished |= free & (ids[:, place] == END)
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_texts_and_their_scores_are_those_of_a_plain_loop(mesh, variant):
    module = captioners.module(**variant)
    params, image, prompt, prompt_length, rng = arguments(module, 32, seed=18)
    ids, score = compiled(module)(params, image, prompt, prompt_length, rng)
    np.testing.assert_array_equal(ids, greedy(module, params, image, prompt, prompt_length))
    expected, _ = captioners.scores(module, params, image, ids, prompt_length)
    np.testing.assert_allclose(score, expected, atol=1e-5)
    ended = (np.asarray(ids) == END).any(axis=1)
    assert ended.any() and not ended.all()


def assert_well_formed(ids, prompt, prompt_length):
    """Prompts are kept, and after the end there is padding alone."""
    for row, begin, count in zip(np.asarray(ids), prompt, prompt_length, strict=True):
        np.testing.assert_array_equal(row[:count], begin[:count])
        rest = [*row[count:]]
        end = rest.index(END) if END in rest else len(rest)
        assert PAD not in rest[:end] and set(rest[end + 1 :]) <= {PAD}


@pytest.mark.parametrize("strategy", [GREEDY, Strategy(temperature=2.0), Strategy(beams=3)])
def test_prompts_are_kept_texts_are_padded_and_one_program_serves_prompts_of_all_lengths(mesh, strategy):
    module = captioners.module(**VARIANTS[1])
    run = compiled(module, strategy)
    for longest in (1, 3, 6):
        params, image, prompt, prompt_length, rng = arguments(module, 8, longest, longest, size=0.3)
        ids, score = run(params, image, prompt, prompt_length, rng)
        assert ids.dtype == jnp.int32
        assert_well_formed(ids, prompt, prompt_length)
        np.testing.assert_array_equal(np.asarray(score)[prompt_length == 6], 0)
    assert run._cache_size() == 1


def test_without_an_end_token_texts_are_as_long_as_can_be(mesh):
    module = captioners.module()
    ids, _ = compiled(module, end_id=None)(*arguments(module, 12))
    ended = np.asarray(ids)[:, :-1] == END
    assert ended.any() and not (np.asarray(ids) == PAD).any()


def drawn_and_expected(strategy, rows=4000, seed=1):
    """How often each last token of a text was drawn, and its probability without a strategy."""
    module = captioners.module()
    params, image, prompt, *_ = arguments(module, 1, seed, size=0.5)
    image, prompt = np.repeat(image, rows, axis=0), np.repeat(prompt, rows, axis=0)
    ids, _ = compiled(module, strategy)(params, image, prompt, np.full(rows, 5, np.int32), keys(rows, seed))
    logits = captioners.log_probabilities(module, params, image[:1], np.asarray(ids)[:1])[0, -1]
    return np.bincount(np.asarray(ids)[:, -1], minlength=7), logits


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (2.5, 0, 1.0), (1.5, 3, 1.0), (1.0, 0, 0.7), (2.0, 4, 0.8)]
)
def test_draws_follow_the_probabilities_of_the_tokens_that_are_allowed(mesh, temperature, top_k, top_p):
    counts, logits = drawn_and_expected(Strategy(1, 1.0, temperature, top_k, top_p))
    probabilities = np.exp(logits / temperature)
    order = np.argsort(-probabilities)
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    probabilities /= probabilities.sum()
    allowed = probabilities > 0
    assert 2 <= allowed.sum() == (6 if top_k == 0 and top_p == 1 else allowed.sum())
    assert (counts[~allowed] == 0).all()
    expected = counts.sum() * probabilities[allowed]
    chi_square = ((counts[allowed] - expected) ** 2 / expected).sum()
    assert chi_square < 25, (counts, counts.sum() * probabilities)


@settings(deadline=None, max_examples=15)
@given(top_k=st.integers(0, 9), top_p=st.floats(0.01, 1), seed=st.integers(0, 999))
def test_the_likeliest_may_always_be_drawn_and_nothing_that_is_less_likely_than_what_is_left_out(top_k, top_p, seed):
    logits = np.float32(np.random.default_rng(seed).normal(0, 2, (3, 7)))
    kept = np.asarray(kept_logits(jnp.asarray(logits), top_k, top_p))
    allowed = np.isfinite(kept)
    np.testing.assert_array_equal(kept[allowed], logits[allowed])
    assert allowed[np.arange(3), logits.argmax(axis=1)].all()
    assert (allowed.sum(axis=1) <= (top_k or 7)).all()
    for row, may in zip(logits, allowed, strict=True):
        assert may.all() or row[may].min() > row[~may].max()


def test_the_same_key_draws_the_same_text_whatever_the_other_rows_are(mesh):
    module = captioners.module()
    run = compiled(module, Strategy(temperature=2.0))
    params, image, prompt, _, rng = arguments(module, 8, size=0.3)
    none = np.zeros(8, np.int32)
    ids, score = run(params, image, prompt, none, rng)
    for order in (np.arange(8), np.arange(8)[::-1]):
        again, scores = run(params, image[order], prompt[order], none, rng[order])
        np.testing.assert_array_equal(again, ids[order])
        np.testing.assert_allclose(scores, score[order], atol=1e-5)
    other, _ = run(params, image, prompt, none, keys(8, seed=1))
    assert (np.asarray(other) != np.asarray(ids)).any(axis=1).sum() > 4
    same_image, _ = run(params, image[:1].repeat(8, axis=0), prompt, none, rng)
    assert len({tuple(row) for row in np.asarray(same_image).tolist()}) > 4


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 9999), power=st.floats(-1, 3), size=st.floats(0.2, 1.0))
def test_with_beams_enough_it_is_the_best_of_all_texts(seed, power, size):
    module = captioners.module(vocab_size=5, length=4)
    texts = [[*text, END] for count in range(4) for text in itertools.product((2, 3, 4), repeat=count)]
    texts = [text + [PAD] * (4 - len(text)) for text in texts] + [*map(list, itertools.product((2, 3, 4), repeat=4))]
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        params, image = captioners.parameters(module, seed, size), captioners.image_tokens(2, seed)
        none = np.zeros(2, np.int32)
        ids, score = searching(module, 128)(params, image, np.zeros((2, 4), np.int32), none, keys(2), power)
        for row in range(2):
            each = jnp.repeat(image[row : row + 1], len(texts), axis=0)
            sums, counts = captioners.scores(module, params, each, np.array(texts), np.zeros(len(texts), np.int32))
            all_scores = sums / ((5 + counts) / 6) ** power
            assert score[row] == pytest.approx(all_scores.max(), abs=1e-5, rel=1e-5)
            assert all_scores[texts.index(np.asarray(ids)[row].tolist())] == pytest.approx(all_scores.max(), abs=1e-5)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 9999), power=st.floats(0, 2), size=st.floats(0.2, 1))
def test_beams_score_what_their_text_does_and_never_below_greedy(seed, power, size):
    module = captioners.module(**VARIANTS[1])
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        params, image, prompt, prompt_length, _ = inputs = arguments(module, 8, seed, size=size)
        ids, score = searching(module, 3)(*inputs, power)
        greedy_ids, greedy_score = compiled(module)(*inputs)
        sums, counts = captioners.scores(module, params, image, ids, prompt_length)
    assert_well_formed(ids, prompt, prompt_length)
    np.testing.assert_allclose(score, sums / penalty(counts, power), atol=2e-5, rtol=1e-5)
    greedy_counts = ((np.arange(6) >= prompt_length[:, None]) & (np.asarray(greedy_ids) != PAD)).sum(axis=1)
    assert (np.asarray(score) >= greedy_score / penalty(greedy_counts, power) - 1e-5).all()


def test_beams_find_likelier_texts_than_greedy_and_shorter_ones_without_a_penalty(mesh):
    module = captioners.module()
    inputs = arguments(module, 64, 3, longest=0, size=0.5)
    found = {power: searching(module, 3)(*inputs, power) for power in (0.0, 3.0)}
    _, greedy_score = compiled(module)(*inputs)
    assert (np.asarray(found[0.0][1]) > np.asarray(greedy_score) + 1e-3).sum() > 3
    short, long = ((np.asarray(found[power][0]) != PAD).sum() for power in (0.0, 3.0))
    assert short < long


def test_it_runs_on_any_mesh(mesh):
    module = captioners.module()
    inputs = arguments(module, 8)
    expected, score = searching(module, 3)(*inputs, 1.0)
    shared = make_mesh(4, 1, 2)
    with jax.set_mesh(shared):
        params, *rest = jax.device_get(inputs)
        rest = jax.device_put(rest, jax.sharding.NamedSharding(shared, jax.P(("data", "fsdp"))))
        found, scores = searching(module, 3)(params, *rest, 1.0)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, score, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_suppressed_tokens_are_never_chosen_and_have_no_share(mesh, variant, beams):
    module = captioners.module(**variant)
    params, image, prompt, prompt_length, rng = arguments(module, 32, seed=7)
    suppress, suppress_first = (2, 4), (END, 5)
    strategy = Strategy(beams, suppress=suppress, suppress_first=suppress_first)
    ids, score = (np.asarray(x) for x in compiled(module, strategy)(params, image, prompt, prompt_length, rng))
    places = np.arange(prompt.shape[1])
    chosen, first = places >= prompt_length[:, None], places == prompt_length[:, None]
    assert not np.isin(ids[chosen], suppress).any() and not np.isin(ids[first], suppress_first).any()
    np.testing.assert_array_equal(ids[~chosen], prompt[~chosen])  # a prompt says what it likes
    assert np.isin(prompt[~chosen], suppress).any() and np.isin(ids[chosen & ~first], suppress_first).any()
    # The scores are those of the distribution over what is left.
    found = captioners.log_probabilities(module, params, image, ids)
    found[..., suppress] = -np.inf
    found[first[..., None] & np.isin(np.arange(found.shape[2]), suppress_first)] = -np.inf
    found -= np.log(np.exp(found).sum(axis=2, keepdims=True))
    own = np.take_along_axis(found, ids[..., None], axis=2)[..., 0]
    counted = chosen & (ids != PAD)
    total = np.where(counted, own, 0).sum(axis=1)
    divisor = penalty(counted.sum(axis=1), strategy.length_penalty) if beams > 1 else 1
    # Sums of float32 log-probabilities: some differ by 6e-6 of themselves.
    np.testing.assert_allclose(score, total / divisor, rtol=1e-5, atol=1e-5)
