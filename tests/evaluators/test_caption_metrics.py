"""BLEU, ROUGE-L and CIDEr-D against pycocoevalcap, whose figures `make_goldens_captions.py` wrote down."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.evaluators import caption_metrics as metrics
from tests.evaluators.goldens import GOLDENS

CASES = GOLDENS["cases"]
TOLERANCE = 1e-6


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_the_coco_evaluation(name):
    case = CASES[name]
    arguments = case["captions"], case["references"]
    np.testing.assert_allclose(metrics.bleu(*arguments), case["bleu"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(metrics.rouge_l(*arguments), case["rouge_l"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(metrics.cider_d(*arguments), case["cider_d"], rtol=0, atol=TOLERANCE)


def test_the_fixture_reaches_what_makes_a_difference():
    """Clipping, brevity, several references, lengths on both sides, and captions that share nothing."""
    case = CASES["many"]
    pairs = zip(case["captions"], case["references"], strict=True)
    sizes = [(len(caption.split()), [len(reference.split()) for reference in own]) for caption, own in pairs]
    assert any(size < min(own) for size, own in sizes) and any(size > max(own) for size, own in sizes)
    assert {len(own) for _, own in sizes} == {1, 2, 3, 4, 5}
    assert min(case["cider_d"]) == min(case["rouge_l"]) == 0 and max(case["cider_d"]) > 5
    assert any(len(set(caption.split())) * 2 <= len(caption.split()) for caption in case["captions"])


def test_perfect_and_empty_captions():
    texts = ["a red hat on a dog", "two small cats sit near grass", "the street"]
    own = [[text] for text in texts]
    np.testing.assert_allclose(metrics.bleu(texts, own), 1, atol=1e-6)
    np.testing.assert_allclose(metrics.rouge_l(texts, own), 1)
    np.testing.assert_allclose(metrics.cider_d(texts, own), [10, 10, 5])  # "the street" has no 3-grams and 4-grams
    empty = ["", "", ""]
    assert max(metrics.bleu(empty, own)) < 1e-6
    assert (metrics.rouge_l(empty, own) == 0).all() and (metrics.cider_d(empty, own) == 0).all()
    assert metrics.rouge_l(["a"], [["", "a"]]) == [1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6), min_size=2, max_size=2))
def test_the_longest_common_subsequence_is_that_of_all_subsequences(pair):
    def subsequences(words):
        return {tuple(w for place, w in enumerate(words) if mask >> place & 1) for mask in range(1 << len(words))}

    expected = max(map(len, subsequences(pair[0]) & subsequences(pair[1])))
    assert metrics._longest_common(*pair) == expected


@pytest.mark.parametrize("text", GOLDENS["tokens"])
def test_words_are_those_of_the_coco_evaluation_but_for_what_is_said(text):
    said = {
        " -lrb-": "",
        " -rrb-": "",
        "’": "'",
        "man 's": "man's",
        "is n't": "isn't",
        " & ": " ",
        " % ": " ",
        "2.5": "2 5",
    }
    expected = GOLDENS["tokens"][text]
    for theirs, ours in said.items():
        expected = expected.replace(theirs, ours)
    assert metrics.tokenize(text) == expected


def test_words_of_any_script():
    assert metrics.tokenize("  Über-all--weg, 'quoted' (हिन्दी)! -x- 「犬」 ") == "über-all weg quoted हिन्दी x 犬"
    assert metrics.tokenize(" -' ... ") == ""
