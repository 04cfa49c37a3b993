import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.data import records
from mmjax.data.records import Fields, assemble
from mmjax.errors import RecordError

TEXT = st.text(max_size=20).map(records.clean_text)


@given(
    key=st.text(alphabet=st.characters(exclude_categories=("Cs",))),
    image=st.binary(max_size=50),
    captions=st.dictionaries(TEXT, st.lists(TEXT, min_size=1, max_size=3), max_size=3),
    label=st.integers(-(2**63), 2**63 - 1),
    mirror=st.booleans(),
)
def test_a_packed_record_comes_back(key, image, captions, label, mirror):
    record = {"key": key, "image": image, "captions": captions, "label": label, "mirror": mirror}
    assert records.decode(records.encode(record)) == record
    assert records.encode(record) == records.encode(dict(reversed(record.items())))


@given(st.binary(max_size=100))
def test_other_bytes_are_no_record(data):
    with pytest.raises(RecordError):
        records.decode(data)


def texts(raw, *names):
    return assemble(raw, Fields(captions=names), "k")["captions"]


def test_captions_in_every_shape():
    assert texts({"caption": " a "}) == {"caption": ["a"]}
    assert texts({"captions": ["a", None, "b", ""], "txt": "c"}) == {"captions": ["a", "b"]}
    assert texts({"captions": {"en": "a", "de": ["b", "c"], "fr": None, "it": ""}}) == {"en": ["a"], "de": ["b", "c"]}
    assert texts({"caption": math.nan, "txt": b"caf\xc3\xa9"}) == {"txt": ["café"]}
    assert texts({"sentences": [{"raw": "a", "tokens": ["a"]}, {"raw": "b"}]}) == {"sentences": ["a", "b"]}
    assert texts({"meta": {"alt": "a"}, "x.y": "b"}, "meta.alt", "x.y") == {"meta.alt": ["a"], "x.y": ["b"]}
    assert texts({"caption": "\ud800x"})["caption"] == ["?x"]
    assert len(texts({"caption": "x" * 20_000})["caption"][0]) == records.MAX_CAPTION
    assert texts({"image": b""}) == {}
    for wrong in (5, [5], {"en": 5}, [{"tokens": []}]):
        with pytest.raises(RecordError, match="record 'k': field \"captions\" is neither a text nor a list of texts"):
            texts({"captions": wrong})
    with pytest.raises(RecordError, match="record 'k' has no field \"alt\"; it has: 'caption'"):
        texts({"caption": "a"}, "alt")


def test_labels_and_images():
    assert assemble({"cls": b"7"}, Fields(), "k")["label"] == 7
    assert assemble({"label": "cat"}, Fields(), "k")["label"] == -1
    for wrong in ("cat", math.inf, 10**30, [1]):
        with pytest.raises(RecordError, match="the label is no 64-bit whole number"):
            assemble({"y": wrong}, Fields(label="y"), "k")
    assert assemble({"jpg": lambda: b"x"}, Fields(), "k")["image"] == b"x"
    assert assemble({"image": {"bytes": b"x", "path": None}, "jpg": b"y"}, Fields(), "k")["image"] == b"x"
    assert "image" not in assemble({"txt": "a"}, Fields(), "k")
    with pytest.raises(RecordError, match="the image is no bytes but str"):
        assemble({"image": "aGVsbG8="}, Fields(), "k")
