import base64
import gzip
import io
import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmjax.data import openmoji, records, text, words
from mmjax.data.text_layout import CLEANERS
from mmjax.errors import UserError
from tests.data.make_goldens_text import FOLDER, SENTENCES, write
from tests.interop import whispers

GOLDENS = sorted(path.stem.removeprefix("text_") for path in FOLDER.glob("text_*.json"))


@pytest.fixture(scope="session")
def tokenizer(openmoji_folder):
    return text.load(openmoji_folder / openmoji.tokenizer_name(["en"]))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A vocabulary as `train_bpe` writes it."""
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    text.train_bpe(SENTENCES, 600, path)
    return path


@pytest.fixture(scope="session")
def sentencepiece_model():
    return train_sentencepiece()


def test_a_text_may_end_with_the_id_that_also_pads():
    """Where no settings name a padding token, it is 0, which byte-level vocabularies have for "!"."""
    made = text.HuggingFaceTokenizer(whispers.tokenizer())
    (ids,) = made.encode(["Hear, hear!"], 16)
    assert made.pad_id == 0 and ids[12] == 0 and ids[13] == made.end_id
    assert made.decode(ids) == "Hear, hear!"


def train_sentencepiece(**settings) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox", "two red dogs", "a dog and a fox"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def golden_paths(tmp_path_factory) -> dict[str, Path]:
    """Name -> what to load: a folder, or its only file."""
    paths = {}
    for name in GOLDENS:
        packed = json.loads((FOLDER / f"text_{name}.json").read_text())["files"]
        files = {file: base64.b64decode(content) for file, content in packed.items()}
        folder = write(files, tmp_path_factory.mktemp(name))
        paths[name] = folder if len(files) > 1 else folder / next(iter(files))
    return paths


@pytest.mark.parametrize("name", GOLDENS)
def test_ids_are_those_of_the_peers(name, golden_paths):
    """transformers and open_clip gave the goldens; `test_peers_text.py` asks them again where they are installed."""
    tokenizer = text.load(golden_paths[name])
    for length, expected in json.loads((FOLDER / f"text_{name}.json").read_text())["ids"].items():
        rows = tokenizer.encode(SENTENCES, int(length))
        assert rows.dtype == np.int32
        for sentence, row, ids in zip(SENTENCES, rows.tolist(), expected, strict=True):
            assert row == ids, sentence
        assert tokenizer.vocab_size > rows.max()


@pytest.mark.parametrize("name", GOLDENS)
def test_tokenizers_survive_json_and_pickle(name, golden_paths):
    original = text.load(golden_paths[name])
    expected = original.encode(SENTENCES, 20)
    saved = json.loads(json.dumps(original.to_json()))
    for copy in (text.from_json(saved), pickle.loads(pickle.dumps(original))):
        np.testing.assert_array_equal(copy.encode(SENTENCES, 20), expected)
        for name in ("pad_id", "vocab_size", "start_id", "end_id", "mask_id", "special_ids"):
            assert getattr(copy, name) == getattr(original, name)
        np.testing.assert_array_equal(copy.word_marks, original.word_marks)


@pytest.mark.parametrize("name", GOLDENS)
def test_decoding_gives_the_text_back(name, golden_paths):
    tokenizer = text.load(golden_paths[name])
    for sentence in ("two small boats", "the lazy dog and a red fox"):
        for row in tokenizer.encode([sentence], 60):
            assert tokenizer.decode(row) == sentence
    assert tokenizer.decode(tokenizer.encode([""], 5)[0]) == ""
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("name", GOLDENS)
@settings(deadline=None, max_examples=20)
@given(value=st.text(alphabet=st.characters(), max_size=40), length=st.integers(0, 30))
def test_any_string_gives_a_row(name, golden_paths, value, length):
    tokenizer = text.load(golden_paths[name])
    rows = tokenizer.encode([value], length)
    assert rows.shape == (1, length)
    assert ((rows >= 0) & (rows < tokenizer.vocab_size)).all()
    tokenizer.decode(rows[0])


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("value", ["\ud83d", "a\0b", "\0", "", "x" * 2**20, "word " * 2**18, "\udfff" * 100])
def test_hostile_strings_give_a_row(name, value, golden_paths):
    rows = text.load(golden_paths[name]).encode([value, "a fox"], 16)
    np.testing.assert_array_equal(rows[1], text.load(golden_paths[name]).encode(["a fox"], 16)[0])


def test_long_texts_are_cut(trained):
    tokenizer = text.load(trained)
    start = "fox " * (records.MAX_CAPTION // 4)
    row, cut = tokenizer.encode([start + "dog", start], records.MAX_CAPTION + 10)
    np.testing.assert_array_equal(row, cut)


def words_of(tokenizer, written):
    """The text of each word by the marks, without special tokens."""
    row = tokenizer.encode([written], 200)[0]
    marks = tokenizer.word_marks[row]
    begins = (marks & words.STARTS) > 0
    begins[1:] |= (marks[:-1] & words.ENDS) > 0
    begins[0] = True
    parts = np.split(row, np.flatnonzero(begins)[1:])
    assert all(part.tolist() == [part[0]] for part in parts if np.isin(part, tokenizer.special_ids).any())
    found = [tokenizer.decode(part).strip() for part in parts if part[0] not in tokenizer.special_ids]
    return [word for word in found if word]  # a space may be a token of its own


@pytest.mark.parametrize("name", [*GOLDENS, "trained", "sentencepiece"])
@settings(deadline=None, max_examples=20)
@given(written=st.lists(st.text("adefgnorstx", min_size=1, max_size=8), min_size=1, max_size=8))
def test_marks_tell_words_apart(name, golden_paths, trained, sentencepiece_model, written):
    if name == "sentencepiece":
        tokenizer = text.SentencePieceTokenizer(sentencepiece_model)
    else:
        tokenizer = text.load(trained if name == "trained" else golden_paths[name])
    assert tokenizer.word_marks.dtype == np.int8 and tokenizer.word_marks.shape == (tokenizer.vocab_size,)
    assert words_of(tokenizer, " ".join(written)) == written


@pytest.mark.parametrize("name", sorted({*GOLDENS} - {"siglip"}))  # it leaves punctuation out
def test_punctuation_is_a_word(name, golden_paths):
    found = words_of(text.load(golden_paths[name]), "a red fox, two (small) boats.")
    assert found == ["a", "red", "fox", ",", "two", "(", "small", ")", "boats", "."]


@pytest.mark.parametrize("name", GOLDENS)
def test_special_tokens(name, golden_paths):
    tokenizer = text.load(golden_paths[name])
    start, end, mask, special = {
        "bert": (2, 3, 4, (0, 1, 2, 3, 4)),
        "clip": (662, 663, None, (662, 663)),
        "gpt2": (None, None, None, (0,)),
        "gpt2_padded": (None, 0, None, (0, 300)),
        "open_clip": (662, 663, None, (0, 662, 663)),
        "siglip": (None, 1, None, (0, 1, 2)),
        "t5": (None, 1, None, (0, 1, 2)),
    }[name]
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id) == (start, end, mask)
    assert tokenizer.special_ids == special
    assert (tokenizer.word_marks[list(special)] == words.STARTS | words.ENDS).all()


def test_mask_tokens(golden_paths, tmp_path):
    files = {path.name: path.read_bytes() for path in golden_paths["gpt2"].iterdir()}
    files["tokenizer_config.json"] = b'{"tokenizer_class": "RobertaTokenizer"}'
    roberta = text.load(write(files, tmp_path))
    assert roberta.encode(["<mask>"], 3)[0].tolist() == [roberta.start_id, roberta.mask_id, roberta.end_id]
    assert {roberta.start_id, roberta.pad_id, roberta.end_id, roberta.mask_id} < {*roberta.special_ids}
    model = train_sentencepiece(user_defined_symbols=["<mask>"])
    bare = text.SentencePieceTokenizer(model)
    assert bare.mask_id == bare.processor.piece_to_id("<mask>") + 1  # moved up for the padding
    assert bare.special_ids == (0, 1, 2, 3, bare.mask_id)  # padding, unknown, start, end


def test_words_of_scripts_and_vocabularies_without_spaces():
    tokens = {0: "Ġfox", 1: "es", 2: "Ġ", 3: "Ġ(", 4: "'s", 5: "åĽ¾", 6: "åĽ", 7: "Ċ", 8: "Ġ12", 9: "<end>"}
    decoder = {"(": "(", "åĽ¾": "图", "åĽ": "\ufffd", "Ċ": "\n", "": ""}
    marks = words.word_marks(tokens, words.Spelling(space="Ġ"), [9], 10, lambda token: decoder.get(token, token))
    both = words.STARTS | words.ENDS
    assert marks.tolist() == [1, 0, 1, both, 0, both, 0, both, 1, both]
    assert words.word_marks({0: "a", 1: "b"}, words.Spelling(space="Ġ"), [], 2).tolist() == [both, both]
    assert words.spelling_of({"model": {"type": "WordLevel"}}) == words.Spelling()


def test_truncation_keeps_start_and_end(golden_paths):
    for name in ("clip", "open_clip", "bert"):
        tokenizer = text.load(golden_paths[name])
        whole = tokenizer.encode([SENTENCES[0]], 200)[0]
        start, end = tokenizer.layout.before[0], tokenizer.layout.after[0]
        row = tokenizer.encode([SENTENCES[0]], 6)[0]
        assert row.tolist() == [start, *whole[1:5], end] and whole[0] == start


def test_changing_the_result_leaves_the_next_one_alone(trained):
    tokenizer = text.load(trained)
    first = tokenizer.encode(["a fox"], 8)
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(tokenizer.encode(["a fox"], 8), expected)


@settings(deadline=None)
@given(value=st.text(alphabet=st.characters(exclude_categories=("Cs", "Cn")), max_size=30))
def test_no_input_is_unknown(trained, value):
    """Any text comes back from its ids, but for what NFKC, lower case and stripping change."""
    assume("<pad>" not in value and "<eos>" not in value)
    tokenizer = text.load(trained)
    ids = tokenizer.encode([value], 256)[0]
    expected = unicodedata.normalize("NFKC", value).lower()
    assert tokenizer.decode(ids).split() == expected.split()


def test_trained_vocabularies_end_texts(trained):
    tokenizer = text.load(trained)
    rows = tokenizer.encode(["dog", "woman astronaut with a very long name that does not fit", "", "dog<eos>"], 5)
    assert rows.dtype == np.int32 and rows.shape == (4, 5)
    pad, end = 0, 1  # the order of train_bpe's special tokens
    assert tokenizer.pad_id == pad
    assert rows[0].tolist().count(end) == 1 and rows[0, -1] == pad
    assert (rows[1] != pad).all() and rows[1, -1] == end
    assert rows[2].tolist() == [end, pad, pad, pad, pad]
    np.testing.assert_array_equal(rows[3], rows[0])  # no second end


def test_what_older_checkpoints_saved_gives_the_same_rows(trained, sentencepiece_model):
    for form, data, original in (
        ("tokenizer.json", json.loads(trained.read_text()), text.load(trained)),
        (
            "sentencepiece",
            base64.b64encode(sentencepiece_model).decode(),
            text.SentencePieceTokenizer(sentencepiece_model),
        ),
    ):
        copy = text.from_json({"format": form, "data": data})
        np.testing.assert_array_equal(copy.encode(["a red fox", ""], 8), original.encode(["a red fox", ""], 8))


def test_english_captions_need_no_truncation(tokenizer, openmoji_folder):
    from array_record.python.array_record_module import ArrayRecordReader

    captions = []
    for split in openmoji.SPLITS:
        reader = ArrayRecordReader(str(openmoji_folder / f"{split}.array_record"))
        captions += [records.decode(packed)["captions"]["en"][0] for packed in reader.read_all()]
        reader.close()
    assert (tokenizer.encode(captions, 20)[:, 12:] == tokenizer.pad_id).all()


def test_bare_sentencepiece_models_keep_zero_for_padding(sentencepiece_model, tmp_path):
    path = tmp_path / "spm.model"
    path.write_bytes(sentencepiece_model)
    tokenizer = text.load(path)
    rows = tokenizer.encode(["a red dog", "fox", "§"], 8)
    assert tokenizer.decode(rows[0]) == "a red dog"
    assert tokenizer.pad_id == 0 and rows.max() < tokenizer.vocab_size
    end = 2 + 1  # sentencepiece's default, moved up
    for row in rows:
        content = row[: list(row).index(end)]
        assert (content != 0).all() and (row[len(content) + 1 :] == 0).all()


def test_bare_sentencepiece_models_keep_their_own_padding(tmp_path):
    path = tmp_path / "spm.model"
    path.write_bytes(train_sentencepiece(pad_id=3))
    tokenizer = text.load(path)
    assert tokenizer.pad_id == 3
    assert tokenizer.encode([""], 4)[0].tolist() == [2, 3, 3, 3]


def test_settings_beside_a_sentencepiece_model_decide(sentencepiece_model, tmp_path):
    config = {"pad_token": {"content": "<unk>"}, "eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    folder = write({"tokenizer.model": sentencepiece_model}, tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps(config))
    for path in (folder, folder / "tokenizer.model"):
        tokenizer = text.load(path)
        assert tokenizer.pad_id == 0
        assert tokenizer.encode([""], 4)[0].tolist() == [1, 2, 0, 0]


def test_siglip_texts_lose_case_and_punctuation(golden_paths):
    tokenizer = text.load(golden_paths["siglip"])
    plain, written = tokenizer.encode(["the red fox isnt here", "The (RED)  fox: isn't\n here!"], 40)
    np.testing.assert_array_equal(plain, written)
    assert tokenizer.pad_id == 1 and plain[-1] == 1


def test_siglip2_checkpoints_are_lower_cased_though_they_name_another_class(trained, tmp_path):
    parts = json.loads(trained.read_text()) | {"normalizer": None}
    files = {
        "tokenizer.json": json.dumps(parts).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "GemmaTokenizer"}',
    }
    capitals = text.load(write(files, tmp_path / "gemma")).encode(["Fox", "fox"], 8)
    assert (capitals[0] != capitals[1]).any()
    files["config.json"] = b'{"model_type": "siglip2"}'
    capitals = text.load(write(files, tmp_path / "siglip2")).encode(["Fox", "fox"], 8)
    assert (capitals[0] == capitals[1]).all()
    # Those for one resolution are SigLIP models by their config.json; their tokenizer's settings tell.
    files["config.json"] = b'{"model_type": "siglip"}'
    files["tokenizer_config.json"] = b'{"tokenizer_class": "GemmaTokenizer", "do_lower_case": true}'
    capitals = text.load(write(files, tmp_path / "fixed")).encode(["Fox", "fox"], 8)
    assert (capitals[0] == capitals[1]).all()


def test_bert_settings_reach_the_normalizer(golden_paths, tmp_path):
    files = {path.name: path.read_bytes() for path in golden_paths["bert"].iterdir()}
    files["tokenizer_config.json"] = b'{"tokenizer_class": "BertTokenizer", "do_lower_case": false}'
    cased = text.load(write(files, tmp_path)).encode(["Fox", "fox"], 8)
    assert (cased[0] != cased[1]).any()


def test_padding_to_a_fixed_length_is_no_end_of_a_text(golden_paths, tmp_path):
    """As tokenizers of sentence-transformers are saved."""
    files = {path.name: path.read_bytes() for path in golden_paths["bert"].iterdir()}
    parts = json.loads(files["tokenizer.json"])
    parts["padding"] = {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    parts["padding"] |= {"pad_type_id": 0, "pad_token": "[PAD]"}
    parts["truncation"] = {"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    files["tokenizer.json"] = json.dumps(parts).encode()
    sentence = " ".join(SENTENCES[:2])
    found = text.load(write(files, tmp_path)).encode([sentence], 20)
    np.testing.assert_array_equal(found, text.load(golden_paths["bert"]).encode([sentence], 20))


def test_a_padding_token_that_only_the_settings_name_is_added(trained, tmp_path):
    files = {"tokenizer.json": trained.read_bytes(), "special_tokens_map.json": b'{"pad_token": "[MY PAD]"}'}
    tokenizer = text.load(write(files, tmp_path))
    assert tokenizer.pad_id == text.load(trained).vocab_size == tokenizer.vocab_size - 1
    assert tokenizer.encode([""], 2)[0].tolist() == [tokenizer.pad_id] * 2  # the settings ask for no end token


def test_padding_of_a_bare_tokenizer_json(trained, tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(trained))
    tokenizer.enable_padding(pad_id=7, pad_token="x", length=9)
    tokenizer.save(str(tmp_path / "own.json"))
    assert text.load(tmp_path / "own.json").encode([""], 3)[0].tolist() == [1, 7, 7]


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("a &amp;amp; b", "a & b"),
        ("caf&eacute;", "café"),
        ("“It’s”\u3000ﬁne", '"it\'s" fine'),
        ("ＡＢＣ１", "abc1"),
        ("e\u0301", "é"),
        (" A\n\tB\u00a0 C ", "a b c"),
        ("\ufeffa\x00b\x7f", "ab"),
        ("<b>&lt;", "<b><"),
        ("½™", "½™"),
    ],
)
def test_open_clip_texts_are_cleaned(written, plain):
    assert CLEANERS["open_clip"](written) == plain


def test_faults_are_clear_errors(tmp_path, sentencepiece_model, golden_paths):
    def fails(path, message):
        with pytest.raises(UserError, match=message) as caught:
            text.load(path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)

    fails(tmp_path / "missing.json", "cannot read the tokenizer")
    fails(tmp_path, "holds no tokenizer")
    for name, content in (
        ("bad.json", b"{}"),
        ("binary.json", b"\xff\xfe"),
        ("bad.model", b"nothing"),
        ("bad.txt.gz", b"nothing"),
        ("lines.txt.gz", gzip.compress(b"header\nthree words here")),
    ):
        (tmp_path / name).write_bytes(content)
        fails(tmp_path / name, "cannot read the tokenizer|neither a tokenizer.json nor a sentencepiece")
    xlm = write({"sentencepiece.bpe.model": sentencepiece_model}, tmp_path / "xlm")
    fails(xlm, "XLM-R's tokenizer.*tokenizer.json")
    (xlm / "tokenizer_config.json").write_text('{"tokenizer_class": "MBartTokenizer"}')
    fails(xlm / "sentencepiece.bpe.model", "MBart.*tokenizer.json")
    (xlm / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "pad_token": "[none]"}')
    fails(xlm, r"padding token '\[none\]' is not in it")
    (xlm / "tokenizer_config.json").write_text("{")
    fails(xlm, "cannot read .*tokenizer_config.json")
    (xlm / "tokenizer_config.json").write_text("[]")
    fails(xlm, "holds no JSON object")
    files = {path.name: path.read_bytes() for path in golden_paths["gpt2"].iterdir()}
    files["tokenizer_config.json"] = b'{"tokenizer_class": "XLMTokenizer"}'
    fails(write(files, tmp_path / "merges"), "XLMTokenizer is read from its tokenizer.json alone")
    (tmp_path / "merges" / "merges.txt").unlink()
    (tmp_path / "merges" / "tokenizer_config.json").unlink()
    fails(tmp_path / "merges", "neither a tokenizer.json|cannot read")
