"""BLEU, ROUGE-L and CIDEr-D of captions against references: of words between spaces, which `tokenize` makes.

Given the same words, the figures are those of the COCO caption evaluation ("Microsoft COCO Captions", Chen et al. 2015,
section 3; the package pycocoevalcap).
"""

import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

ORDER = 4  # the longest n-grams
BETA = 1.2  # how much more recall counts than precision in ROUGE-L
SIGMA = 6.0  # words by which lengths may differ in CIDEr-D
_NONE, _FEW = 1e-15, 1e-9  # what the COCO evaluation adds to counts of hits and of n-grams

Grams = Counter[tuple[str, ...]]


def tokenize(text: str) -> str:
    """The words of a caption in lower case, with one space between them and without punctuation.

    Apostrophes and hyphens inside a word stay: "a medium-dark man's hat". This is simpler than Stanford's PTBTokenizer,
    which the COCO evaluation runs in Java: that one makes two words of "man's" ("man 's") and "isn't" ("is n't"), keeps
    "&", "%" and "2.5", which here are left out or split, and leaves "-lrb-" for a bracket. Figures differ only where
    captions hold such words.
    """
    words = text.lower().translate(_punctuation())
    return " ".join(re.sub(r"(?<![^\s'-])['-]+|['-]+(?![^\s'-])", " ", words).split())


@lru_cache(maxsize=1)
def _punctuation() -> dict[int, str]:
    marks = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("P"))
    kept = {ord("'"): "'", ord("’"): "'", ord("-"): "-", ord("‐"): "-"}
    return dict.fromkeys(marks, " ") | kept


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of all captions together ("BLEU", Papineni et al. 2002, section 2), in [0, 1].

    The brevity penalty compares with the reference that is closest in length, of two the shorter one. No hits count as
    1e-15 of one, as in the COCO evaluation.

    Args:
      captions: words between spaces.
      references: for each caption one or more.
    """
    hits, count, length, wanted = [0] * ORDER, [0] * ORDER, 0, 0
    for caption, own in zip(captions, references, strict=True):
        grams, most, words = _grams(caption), Counter(), len(caption.split())
        for reference in own:
            most |= _grams(reference)
        for gram, times in (grams & most).items():
            hits[len(gram) - 1] += times
        for gram, times in grams.items():
            count[len(gram) - 1] += times
        length += words
        wanted += min((abs(size - words), size) for size in (len(reference.split()) for reference in own))[1]
    precisions = [(hit + _NONE) / (number + _FEW) for hit, number in zip(hits, count, strict=True)]
    ratio = (length + _NONE) / (wanted + _FEW)
    penalty = math.exp(min(0.0, 1 - 1 / ratio))
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, ORDER + 1)]


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " captions"]:
    """ROUGE-L of each caption ("ROUGE", Lin 2004, section 3), in [0, 1]: by the longest common subsequence of words.

    It is the F-measure of precision and recall, recall counting more (beta is 1.2). Each of them is the best over the
    references, as in the COCO evaluation. Arguments: see `bleu`.
    """
    return np.array([_rouge_l(*pair) for pair in zip(captions, references, strict=True)])


def _rouge_l(caption: str, own: Sequence[str]) -> float:
    words, others = caption.split(), [reference.split() for reference in own]
    common = [_longest_common(words, other) for other in others]
    precision = max(common) / max(len(words), 1)
    recall = max(length / max(len(other), 1) for length, other in zip(common, others, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if max(common) else 0.0


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    above = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        above = row
    return above[-1]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " captions"]:
    """CIDEr-D of each caption ("CIDEr", Vedantam et al. 2015, sections 3 and 5), in [0, 10].

    How rare an n-gram is comes from the references at hand: in how many captions' references it occurs. Of a single
    caption that is no information, and its CIDEr-D 0. As in the COCO evaluation, the length of a text is its number of
    pairs of neighbouring words. Arguments: see `bleu`.
    """
    own = [[_grams(reference) for reference in each] for each in references]
    frequency = Counter(gram for each in own for gram in set().union(*each))

    def vectors(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        """tf-idf weights by n."""
        found: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDER)]
        for gram, times in grams.items():
            found[len(gram) - 1][gram] = times * math.log(len(own) / max(frequency[gram], 1))
        return found

    scores = []
    for caption, each in zip(captions, own, strict=True):
        grams = _grams(caption)
        made = vectors(grams)
        similar = [_gaussian(grams, other) * _clipped_cosine(made, vectors(other)) for other in each]
        scores.append(10 * sum(similar) / len(similar))
    return np.array(scores)


def _clipped_cosine(made: list[dict], other: list[dict]) -> float:
    """The mean over n of cosines, in which no n-gram of the first counts more than it does in the second."""
    cosines = []
    for first, second in zip(made, other, strict=True):
        product = sum(min(weight, second[gram]) * second[gram] for gram, weight in first.items() if gram in second)
        norms = math.hypot(*first.values()) * math.hypot(*second.values())
        cosines.append(product / norms if norms else 0.0)
    return sum(cosines) / len(cosines)


def _gaussian(first: Grams, second: Grams) -> float:
    """The penalty on a difference in length."""
    sizes = [sum(times for gram, times in grams.items() if len(gram) == 2) for grams in (first, second)]
    return math.exp(-((sizes[0] - sizes[1]) ** 2) / (2 * SIGMA**2))


def _grams(text: str) -> Grams:
    """The n-grams of a text, n from 1 to 4, and how often each is there."""
    words = text.split()
    return Counter(tuple(words[start : start + n]) for n in range(1, ORDER + 1) for start in range(len(words) - n + 1))
