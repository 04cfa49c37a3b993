"""Live parity of the tokenizers with transformers and open_clip, where they are installed."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import text
from tests.data import make_goldens_text as goldens

transformers = pytest.importorskip("transformers")

GEMMA = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": True}
SIGLIP2 = {"tokenizer_class": "Siglip2Tokenizer", "add_bos_token": False, "add_eos_token": True}


@pytest.fixture(scope="session")
def open_clip_vocabulary() -> Path:
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    return Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def assert_equal(tokenizer, folder: Path, but: frozenset[int] = frozenset()) -> None:
    """Every sentence has the peer's ids, cut and whole; `but` holds the indices of sentences left out."""
    for length in goldens.LENGTHS:
        rows = tokenizer.encode(goldens.SENTENCES, length).tolist()
        for index, (row, expected) in enumerate(zip(rows, goldens.peer_ids(folder, length), strict=True)):
            assert row == expected or index in but, goldens.SENTENCES[index]


def test_clip_by_open_clips_vocabulary(open_clip_vocabulary, tmp_path):
    lines = gzip.decompress(open_clip_vocabulary.read_bytes()).decode().split("\n")[1 : 49_152 - 256 - 2 + 1]
    folder = goldens.write(goldens.clip_files([tuple(line.split()) for line in lines]), tmp_path)
    tokenizer = text.load(folder)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (49_408, 49_407)
    assert_equal(tokenizer, folder)
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert_equal(text.load(tmp_path / "saved"), folder)


def test_open_clip(open_clip_vocabulary):
    tokenizer = text.load(open_clip_vocabulary)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (49_408, 0)
    peer = goldens.open_clip_tokenizer().SimpleTokenizer()
    sentences = [
        *goldens.SENTENCES,
        "R&amp;amp;D &lt;b&gt; caf&eacute;",
        "‘“ﬃ”’ \u3000ＡＢ｡ ŉ\ufeff\u0007",
        "<b>&eacute;",
    ]
    np.testing.assert_array_equal(tokenizer.encode(sentences, 77), peer(sentences).numpy())


@pytest.mark.parametrize(
    "config",
    [
        {"pad_token": "<|endoftext|>"},
        {"pad_token": "<|pad|>"},
        {"pad_token": "<|pad|>", "bos_token": "<|start|>", "add_bos_token": True, "add_eos_token": True},
    ],
)
def test_gpt2(config, tmp_path):
    folder = goldens.write(goldens.gpt2_files(400, config), tmp_path)
    assert_equal(text.load(folder), folder)
    transformers.GPT2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert_equal(text.load(tmp_path / "saved"), folder)


def test_roberta(tmp_path):
    files = goldens.gpt2_files(400, {"tokenizer_class": "RobertaTokenizer"})
    folder = goldens.write(files, tmp_path)
    assert_equal(text.load(folder), folder)


@pytest.mark.parametrize("lower", [True, False])
def test_bert(lower, tmp_path):
    folder = goldens.write(goldens.bert_files(300), tmp_path)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert_equal(text.load(folder), folder)


@pytest.mark.parametrize(
    ("rule", "kind", "config"),
    [
        ("spaces", "unigram", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
        ("nmt_nfkc", "unigram", {"tokenizer_class": "T5Tokenizer"}),
        ("nmt_nfkc", "unigram", {"tokenizer_class": "SiglipTokenizer"}),
        ("nmt_nfkc", "unigram", {"tokenizer_class": "SiglipTokenizer", "do_lower_case": False}),
        ("identity", "bpe", GEMMA),
        ("identity", "bpe", SIGLIP2),
    ],
)
def test_sentencepiece_folders(rule, kind, config, tmp_path):
    folder = goldens.write(goldens.sentencepiece_files(800, rule, config, kind), tmp_path)
    try:
        peer = getattr(transformers, config["tokenizer_class"]).from_pretrained(folder)
    except ValueError as error:  # its protobuf code is newer than protobuf
        pytest.skip(f"transformers cannot read sentencepiece models here: {error}")
    # transformers' T5 normalizes clusters of combining marks as a whole, sentencepiece by character.
    marks = {index for index, sentence in enumerate(goldens.SENTENCES) if "\u0351" in sentence}
    assert_equal(text.load(folder), folder, frozenset(marks if rule == "nmt_nfkc" and "T5" in str(config) else ()))
    peer.save_pretrained(tmp_path / "saved")
    assert_equal(text.load(tmp_path / "saved"), folder)


def test_xlm_roberta_by_its_tokenizer_json(tmp_path):
    files = goldens.sentencepiece_files(800, "nmt_nfkc", {"tokenizer_class": "XLMRobertaTokenizer"})
    files["sentencepiece.bpe.model"] = files.pop("spiece.model")
    folder = goldens.write(files, tmp_path)
    try:
        transformers.XLMRobertaTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    except ValueError as error:
        pytest.skip(f"transformers cannot read sentencepiece models here: {error}")
    tokenizer = text.load(tmp_path / "saved")
    assert tokenizer.pad_id == 1
    assert_equal(tokenizer, tmp_path / "saved")
