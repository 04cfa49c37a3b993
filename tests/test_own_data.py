"""A user's own pairs, from the files to a searchable model."""

import json

import numpy as np
import pytest

import mmjax
from mmjax.errors import UserError
from mmjax.training import setup
from mmjax.training.feedback import read_metrics
from tests import programs, tiny
from tests.data import samples

RECIPE = """
from mmjax import config as configs
from tests import tiny

WRITTEN = {written!r}


def get_config(arg=None):
    config = tiny.get_config(4)
    config.model.encoders.text.vocab_size = 320
    config.streams.train = configs.stream(source="", batch_size=16)
    config.streams.train.preprocess.text_length = 6
    config.streams.train.mixture = {{
        "tar": configs.component(source=WRITTEN["webdataset"]),
        "list": configs.component(source=WRITTEN["csv"], upsampling=2.0),
    }}
    config.evaluators = {{"own": configs.retrieval(source=WRITTEN["parquet"], batch_size=32, contact_sheet=True)}}
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "recipe.py").write_text(RECIPE.format(written=samples.write_all(folder)))
    return folder


@pytest.mark.slow
def test_a_mixture_of_own_files_trains_and_is_evaluated_on_own_files(recipe, tmp_path):
    workdir = tmp_path / "run"
    cache = str(tmp_path / "cache")  # an empty one: the vocabulary of an earlier run would be used again
    code, output = programs.run("main", f"--config={recipe / 'recipe.py'}", f"--workdir={workdir}", MMJAX_CACHE=cache)
    assert code == 0, output
    for text in ("indexing", "for a vocabulary", "30 records of webdataset:", "30 records of csv:", "own"):
        assert text in output
    metrics = json.loads((workdir / "result.json").read_text())["metrics"]
    assert {"eval/own/text_to_image_R@1", "eval/own/image_to_text_R@10"} <= metrics.keys()
    assert (workdir / "pictures" / "own-00000004.png").exists()
    assert not any("replaced" in name for line in read_metrics(workdir / "metrics.jsonl") for name in line)
    model = mmjax.load(workdir)
    assert model.tokenizer.vocab_size <= 320
    assert model.encode_text(["picture 3 seen 0"]).shape == (1, 16)
    np.testing.assert_allclose(
        (model.encode_image([str(recipe / "images" / "class_0" / "000.png")]) ** 2).sum(), 1, 1e-5
    )


TAR = "webdataset:{folder}/part-00000.tar"
MISTAKES = [
    ({"source": "webdataset:{folder}/*.tra"}, "no data at"),
    ({"source": "webdataset:{folder}/recipe.py"}, "recipe.py"),
    ({"source": "csv:{folder}/images/list.csv", "fields.captions": ("titel",)}, 'no column "titel"; it has: filepath,'),
    (
        {"source": "csv:{folder}/images/list.csv", "root": "/nowhere"},
        "cannot read 'class_0/000.png' in /nowhere: No such",
    ),
    ({"source": "folder:{folder}/packed"}, "holds no image"),
    ({"source": "parquet:{folder}/packed"}, "no *.parquet in"),
    ({"source": "tfds:{folder}/packed", "split": "valid"}, 'has no split "valid"; known: train'),
    ({"source": "tfds:mnist"}, "'mnist' is no prepared TFDS data set"),
    ({"source": "openmoji:xx"}, 'openmoji has no language "xx"'),
    ({"source": TAR, "preprocess.captions": ("en",)}, "record '000' has no caption in en; it has 'captions'"),
    ({"source": TAR, "fields.captions": ("json.alt",)}, "record '000' has no field \"json.alt\""),
]


@pytest.mark.parametrize("settings, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_is_wrong_with_own_data_is_said_in_one_line(recipe, tmp_path, settings, message):
    config = tiny.get_config()
    for key, value in settings.items():
        value = value.format(folder=recipe) if isinstance(value, str) else value
        config.streams.train.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match="^config.streams.train: ") as error:
        setup.prepare(config, tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
