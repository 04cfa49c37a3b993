"""Packed records, and the embedded data set, as sources."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmjax.data import records
from mmjax.data.records import Fields
from mmjax.data.sources.array_record import ArrayRecordSource
from mmjax.data.sources.openmoji import OpenMojiSource
from mmjax.errors import RecordError, UserError


def make(count, start=0):
    numbers = range(start, start + count)
    captions = [{"en": [f"number {number}", "é"], "de": ["x"]} if number % 2 else {} for number in numbers]
    return [
        {"key": f"k{number}", "image": b"i" * 200, "captions": texts, "label": number - 1, "mirror": False}
        for number, texts in zip(numbers, captions, strict=True)
    ]


def write(path, made):
    path.parent.mkdir(exist_ok=True)
    records.write(path, map(records.encode, made))


def test_records_of_all_files_in_any_thread_and_after_pickling(tmp_path):
    made = make(30)
    write(tmp_path / "0.array_record", made[:12])
    write(tmp_path / "1.array_record", made[12:])
    source = ArrayRecordSource(str(tmp_path / "{0..1}.array_record"))
    assert list(source) == made
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.__getitem__, [*range(30)] * 20)) == made * 20
    assert copy.fingerprint == source.fingerprint
    write(tmp_path / "1.array_record", [record | {"image": b"j" * 500_000} for record in made[12:]])
    assert ArrayRecordSource(str(tmp_path / "*.array_record")).fingerprint != source.fingerprint


def test_what_is_wrong_with_a_whole_data_set(tmp_path):
    write(tmp_path / "good.array_record", make(3))
    records.write(tmp_path / "other.array_record", [b"another layout"])
    with pytest.raises(UserError, match=r"other\.array_record holds no records as"):
        ArrayRecordSource(str(tmp_path / "*.array_record"))
    (tmp_path / "text").write_text("no records at all")
    with pytest.raises(UserError, match=r"text is no ArrayRecord file"):
        ArrayRecordSource(str(tmp_path / "text"))
    with pytest.raises(UserError, match="no data at"):
        ArrayRecordSource(str(tmp_path / "missing*"))
    with pytest.raises(UserError, match="own layout: map no fields"):
        ArrayRecordSource(str(tmp_path / "good.array_record"), fields=Fields(captions=("en",)))
    write(tmp_path / "good.array_record[0:2]", make(1))
    with pytest.raises(UserError, match="rename"):
        ArrayRecordSource(str(tmp_path / "good.array_record*"))


def test_a_bad_record_spoils_no_other(tmp_path):
    path = tmp_path / "a.array_record"
    made = make(20)
    packed = [records.encode(record) for record in made]
    records.write(path, [*packed[:5], b"\xff\xff", *packed[6:]])
    damaged = bytearray(path.read_bytes())
    place = damaged.rfind(packed[10][-20:]) if packed[10][-20:] in damaged else len(damaged) // 200
    damaged[place] ^= 0xFF
    for content in (path.read_bytes(), bytes(damaged)):
        path.write_bytes(content)
        source = ArrayRecordSource(str(path))
        read = 0
        for index in range(20):
            try:
                assert source[index] == made[index]
                read += 1
            except RecordError as error:
                assert f"record {index} of {path}" in str(error)
        assert read >= 18


def test_openmoji_by_split(openmoji_folder):
    train, test, both = (OpenMojiSource("", split) for split in ("train", "test", "all"))
    assert len(train) + len(test) == len(both) > len(test) == 400
    assert set(test[0]["captions"]) >= {"en", "de"}
    assert len({source.fingerprint for source in (train, test, both)}) == 3
    assert pickle.loads(pickle.dumps(test))[7] == test[7]
    with pytest.raises(UserError) as caught:
        OpenMojiSource("", "valid")
    assert str(caught.value) == 'openmoji has no split "valid"; known: train, test, all'
    with pytest.raises(UserError, match='openmoji has no language "folder"; known: en, es'):
        OpenMojiSource("folder", "train")
    some = OpenMojiSource("de,en", "test")
    assert some[0]["captions"] == {language: test[0]["captions"][language] for language in ("de", "en")}
    assert some.fingerprint != test.fingerprint
