import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data import sources, text
from mmjax.errors import UserError


@pytest.fixture(scope="session")
def tokenizer(openmoji_folder):
    return text.load(sources.tokenizer_path("openmoji", ("en",)))


@pytest.fixture(scope="session")
def sentencepiece_model():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox", "two red dogs", "a dog and a fox"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
    )
    return model.getvalue()


@settings(deadline=None)
@given(value=st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=30))
def test_no_input_is_unknown(tokenizer, value):
    """Any text comes back from its ids, but for what NFKC, lower case and stripping change."""
    import unicodedata

    ids = tokenizer.encode([value], 256)[0]
    expected = unicodedata.normalize("NFKC", value).lower()
    assert tokenizer.decode(ids).split() == expected.split()


def test_padding_and_truncation_keep_the_end(tokenizer):
    rows = tokenizer.encode(["dog", "woman astronaut with a very long name that does not fit"], 5)
    assert rows.dtype == np.int32 and rows.shape == (2, 5)
    end = rows[1, -1]
    assert rows[0].tolist().count(end) == 1 and rows[0, -1] == text.PAD_ID
    assert (rows[1] != text.PAD_ID).all()
    assert tokenizer.encode([""], 5)[0].tolist() == [end, 0, 0, 0, 0]


def test_english_captions_need_no_truncation(tokenizer):
    source = sources.open_source("openmoji", "all")
    captions = [source[index]["captions"]["en"][0] for index in range(len(source))]
    assert (tokenizer.encode(captions, 20)[:, 12:] == text.PAD_ID).all()


def test_sentencepiece_models_load(sentencepiece_model, tmp_path):
    path = tmp_path / "spm.model"
    path.write_bytes(sentencepiece_model)
    tokenizer = text.load(path)
    rows = tokenizer.encode(["a red dog", "fox"], 8)
    assert tokenizer.decode(rows[0]) == "a red dog"
    assert (rows[1] == text.PAD_ID).any() and rows.max() < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece"])
def test_tokenizers_survive_json_and_pickle(kind, tokenizer, sentencepiece_model):
    original = tokenizer if kind == "tokenizer.json" else text.SentencePieceTokenizer(sentencepiece_model)
    expected = original.encode(["a red dog"], 8)
    for copy in (text.from_json(original.to_json()), pickle.loads(pickle.dumps(original))):
        np.testing.assert_array_equal(copy.encode(["a red dog"], 8), expected)


def test_what_is_no_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        text.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither a tokenizer.json nor a sentencepiece"):
        text.load(tmp_path / "bad.json")
