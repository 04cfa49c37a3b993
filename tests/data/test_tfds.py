"""TFDS data sets as sources: made with TFDS itself, read without TensorFlow."""

import io
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from mmjax.data import records
from mmjax.data.records import Fields
from mmjax.data.sources import tfds as source_module
from mmjax.data.sources.tfds import TfdsSource
from mmjax.errors import RecordError, UserError

tfds = pytest.importorskip("tensorflow_datasets")

COUNT = 7


def encoded(extension, value):
    return cv2.imencode(extension, np.full((6, 5, 3), value, np.uint8))[1].tobytes()


class TinyPets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.2.0")
    code_path = None  # no checksums of downloads lie beside this file

    def _info(self):
        kinds = tfds.features
        features = {
            "image": kinds.Image(shape=(None, None, 3)),
            "label": kinds.ClassLabel(names=["cat", "big dog"]),
            "title": kinds.Text(),
            "captions": kinds.Sequence(kinds.Text()),
            "objects": kinds.Sequence({"text": kinds.Text(), "kind": kinds.ClassLabel(names=["paw", "tail"])}),
            "meta": {
                "alt": kinds.Text(),
                "photo": kinds.Image(encoding_format="jpeg"),
                "area": kinds.Scalar(np.float32),
            },
            "frames": kinds.Sequence(kinds.Image(shape=(6, 5, 3))),
        }
        return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(COUNT), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            yield (
                number,
                {
                    "image": io.BytesIO(encoded(".png", number)),
                    "label": number % 2,
                    "title": f"é {number}",
                    "captions": ["a", "b"][: number % 3],
                    "objects": [{"text": f"thing {number}", "kind": 1}] * (number % 2),
                    "meta": {"alt": "alt", "photo": io.BytesIO(encoded(".jpg", number)), "area": 1.5},
                    "frames": [io.BytesIO(encoded(".png", number))] * 2,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """TFDS's folder, with version 1.2.0 of the data set."""
    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyPets(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return folder


@pytest.fixture
def in_data_dir(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))


def test_examples_become_records(in_data_dir):
    source = TfdsSource("tiny_pets", "train", Fields(captions=("captions", "title", "label_name", "meta.alt")))
    assert len(source) == COUNT
    by_title = {record["captions"]["title"][0]: record for record in source}
    for number in range(COUNT):
        record = by_title[f"é {number}"]
        assert record["image"] == encoded(".png", number)
        assert record["label"] == number % 2
        assert record["captions"].get("captions", []) == ["a", "b"][: number % 3]
        assert record["captions"]["label_name"] == [["cat", "big dog"][number % 2]]
        assert record["captions"]["meta.alt"] == ["alt"]
    assert [record["key"] for record in source] == [f"tiny_pets/1.2.0/train/{index}" for index in range(COUNT)]


def test_nested_features(in_data_dir):
    source = TfdsSource(
        "tiny_pets:1.2.0", "train", Fields("meta.photo", ("objects.text", "objects.kind_name"), "label")
    )
    assert {record["image"] for record in source} == {encoded(".jpg", number) for number in range(COUNT)}
    assert {str(record["captions"]) for record in source} == {"{}"} | {
        str({"objects.text": [f"thing {number}"], "objects.kind_name": ["tail"]}) for number in (1, 3, 5)
    }


def test_pickled_threaded_and_sliced(in_data_dir, prepared):
    source = TfdsSource(str(prepared / "tiny_pets" / "1.2.0"), "train")
    with ThreadPoolExecutor(4) as pool:
        copy = pickle.loads(pickle.dumps(source))
        assert list(pool.map(copy.__getitem__, [*range(COUNT)] * 20)) == list(source) * 20
    sliced = TfdsSource("tiny_pets/1.2.0", "train[:3]+test")
    assert len(sliced) == 5
    fingerprints = {source.fingerprint, sliced.fingerprint, TfdsSource("tiny_pets", "test").fingerprint}
    fingerprints.add(TfdsSource("tiny_pets", "train", Fields(captions=("title",))).fingerprint)
    assert len(fingerprints) == 4
    assert TfdsSource("tiny_pets", "train").fingerprint == source.fingerprint


def test_the_newest_version(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for version in ("1.2.0", "1.10.0"):
        folder = tmp_path / "tiny_pets" / version
        shutil.copytree(prepared / "tiny_pets" / "1.2.0", folder)
        information = folder / "dataset_info.json"
        information.write_text(information.read_text().replace("1.2.0", version))
    assert TfdsSource("tiny_pets", "test")[0]["key"] == "tiny_pets/1.10.0/test/0"
    assert TfdsSource("tiny_pets/1.2.0", "test")[0]["key"] == "tiny_pets/1.2.0/test/0"


def test_what_is_wrong_with_a_whole_data_set(in_data_dir, prepared, tmp_path):
    with pytest.raises(UserError, match="'mnist' is no prepared TFDS data set.*download_and_prepare"):
        TfdsSource("mnist", "train")
    for split in ("valid", "train[", "train[:x]"):
        with pytest.raises(UserError, match="known: train, test"):
            TfdsSource("tiny_pets", split)
    with pytest.raises(UserError, match="has splits: train, test; set one"):
        TfdsSource("tiny_pets")
    with pytest.raises(UserError, match='no column "text"; it has: .*title'):
        TfdsSource("tiny_pets", "train", Fields(captions=("text",)))

    folder = tmp_path / "copy"
    shutil.copytree(prepared / "tiny_pets" / "1.2.0", folder)
    information = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(information.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"is in the format tfrecord.*file_format=\"array_record\""):
        TfdsSource(str(folder), "train")
    for content in ("{", "{}", "[]", ""):
        (folder / "dataset_info.json").write_text(content)
        with pytest.raises(UserError, match=r"copy"):
            TfdsSource(str(folder), "train")
    (folder / "dataset_info.json").write_text(information)
    for path in folder.glob("*train*"):
        path.unlink()
    with pytest.raises(UserError, match="copy"):
        TfdsSource(str(folder), "train")


def test_a_damaged_example_is_a_fault_of_its_record(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared / "tiny_pets" / "1.2.0", folder)
    for path, packed in zip(sorted(folder.glob("*test*")), (b"\xff\xff", b""), strict=True):
        records.write(path, [packed])
    source = TfdsSource(str(folder), "test")
    for index in range(2):
        with pytest.raises(RecordError, match=f"record 'tiny_pets/1.2.0/test/{index}' cannot be read"):
            source[index]


def packed_data_set(folder):
    """Packed records with TFDS's descriptions beside them."""
    made = [
        {
            "key": f"k{number}",
            "image": encoded(".png", number),
            "captions": {"en": ["a cat", "é"], "de": ["x"]} if number else {},
            "label": number - 1,
            "mirror": bool(number % 2),
        }
        for number in range(4)
    ]
    folder.mkdir(parents=True)
    records.write(folder / "mine-train.array_record-00000-of-00001", map(records.encode, made))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=source_module.tfds_features(),
        split_infos=[tfds.core.SplitInfo(name="train", shard_lengths=[len(made)], num_bytes=0)],
        version="1.0.0",
        check_data=False,
    )
    return made


def test_tfds_reads_packed_records(tmp_path):
    made = packed_data_set(tmp_path / "mine" / "1.0.0")
    examples = tfds.builder_from_directory(tmp_path / "mine" / "1.0.0").as_data_source("train")
    assert len(examples) == len(made)
    for number, example in enumerate(examples):
        assert example["key"] == f"k{number}".encode()
        assert (example["image"] == number).all() and example["image"].shape == (6, 5, 3)
        assert list(example["captions"]["group"]) == [b"en", b"en", b"de"] * bool(number)
        assert list(example["captions"]["text"]) == [b"a cat", "é".encode(), b"x"] * bool(number)
        assert (example["label"], example["mirror"], example["version"]) == (number - 1, number % 2, 2)


def test_packed_records_come_back(tmp_path):
    made = packed_data_set(tmp_path / "mine" / "1.0.0")
    source = TfdsSource(str(tmp_path / "mine"), "train")
    assert list(pickle.loads(pickle.dumps(source))) == made
    with pytest.raises(UserError, match="own layout: map no fields"):
        TfdsSource(str(tmp_path / "mine"), "train", Fields(captions=("en",)))


def test_no_tensorflow_and_no_noise(prepared):
    program = (
        "import sys\n"
        "from mmjax.data.sources.tfds import TfdsSource\n"
        "print(TfdsSource(sys.argv[1], 'train')[0]['label'] in (0, 1), 'tensorflow' in sys.modules)"
    )
    folder = str(prepared / "tiny_pets")
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True False\n", "")
