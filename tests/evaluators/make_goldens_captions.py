"""Writes what pycocoevalcap makes of the captions below, and scikit-learn of scores: `goldens_captions.json`.

    python -m tests.evaluators.make_goldens_captions

Needs pycocoevalcap (`--no-deps` is enough), scikit-learn, and Java for the tokenizer of the COCO evaluation.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from sklearn.metrics import roc_auc_score

PATH = Path(__file__).with_name("goldens_captions.json")
WORDS = ("a", "the", "dog", "cat", "man", "woman", "red", "small", "runs", "sits", "on", "near", "grass", "hat", "two")
TEXTS = [
    "A man, riding a wave on top of a surfboard.",
    'Two dogs (one black; one white) are "playing"!',
    "  a woman: medium-dark skin tone...  ",
    "Un café près de l’eau - is it open?",
    "a man's hat isn't here",
    "2.5 litres & 10% more",
]


def sentences(rng: np.random.Generator) -> tuple[list[str], list[list[str]]]:
    """Captions that share words with one to five references each, some of them in other lengths, or nothing at all."""
    captions, references = [], []
    for number in range(60):
        own = [" ".join(rng.choice(WORDS, rng.integers(1, 14))) for _ in range(rng.integers(1, 6))]
        words = own[0].split()
        if number % 5 == 1:  # repeated words, which clipping is for
            words = words[:2] * 4
        elif number % 5 == 2:
            words = rng.permutation(words).tolist()
        elif number % 5 == 3:
            words = [*words[: len(words) // 2], *rng.choice(WORDS, rng.integers(1, 9))]
        elif number % 10 == 4:
            words = ["nothing", "in", "common"][: rng.integers(1, 4)]
        captions.append(" ".join(words))
        references.append(own)
    return captions, references


def metrics_of(captions: list[str], references: list[list[str]]) -> dict:
    """Bleu over all, Rouge and Cider for each caption."""
    made = {number: [caption] for number, caption in enumerate(captions)}
    own = dict(enumerate(references))
    bleu, _ = Bleu(4).compute_score(own, made, verbose=0)
    return {
        "captions": captions,
        "references": references,
        "bleu": list(map(float, bleu)),
        "rouge_l": Rouge().compute_score(own, made)[1].tolist(),
        "cider_d": Cider().compute_score(own, made)[1].tolist(),
    }


def scores(rng: np.random.Generator, levels: int) -> dict:
    """Scores on a few levels, so with ties, and their area under the curve."""
    belongs = rng.random(200) < 0.4
    values = np.round(rng.normal(belongs * 0.8) * levels) / levels
    return {"scores": values.tolist(), "belongs": belongs.tolist(), "auc": float(roc_auc_score(belongs, values))}


def main() -> None:
    """Writes the file."""
    rng = np.random.default_rng(0)
    captions, references = sentences(rng)
    cases = {
        "many": metrics_of(captions, references),
        "short": metrics_of(["dog", "red hat"], [["dog"], ["the red hat", "hat"]]),
        "single": metrics_of(["a dog runs on grass"], [["a dog runs on the grass"]]),
    }
    tokens = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(TEXTS)})
    names = ("pycocoevalcap", "scikit-learn", "numpy")
    goldens = {
        "made_with": {name: importlib.metadata.version(name) for name in names},
        "cases": cases,
        "tokens": {text: tokens[number][0] for number, text in enumerate(TEXTS)},
        "curves": [scores(rng, levels) for levels in (1, 4, 10**9)],
    }
    PATH.write_text(json.dumps(goldens, separators=(",", ":"), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
