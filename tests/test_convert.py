"""python -m mmjax.convert, both ways, and its mistakes."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from mmjax import api
from tests import programs
from tests.interop import folders
from tests.interop.test_clip import pixels, settings_with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model with a tokenizer."""
    path = folders.write(tmp_path_factory.mktemp("clip") / "clip", "clip", settings_with("gelu"))
    words = {f"w{index}": index for index in range(38)} | {"<start>": 38, "<end>": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "CLIPTokenizer", "bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}'
    )
    return path


def test_to_a_workdir_and_back(folder, tmp_path):
    code, output = programs.run("convert", str(folder), str(tmp_path / "run"))
    assert code == 0 and f"{tmp_path / 'run'}: a workdir with a checkpoint of step 0, from {folder}" in output, output
    code, output = programs.run("convert", str(tmp_path / "run"), str(tmp_path / "exported"))
    assert code == 0 and "exported: a clip model, from " in output, output
    folders.assert_same_tensors(folder, tmp_path / "exported")
    models = [api.load(path) for path in (folder, tmp_path / "run", tmp_path / "exported")]
    texts = ["w3", "w5"]
    for model in models:
        assert model.token_ids(texts).tolist() == [[38, 3, 39, 39, 39, 39], [38, 5, 39, 39, 39, 39]]
        np.testing.assert_array_equal(model.encode_text(texts), models[0].encode_text(texts))
        np.testing.assert_array_equal(model.encode_image([*pixels()]), models[0].encode_image([*pixels()]))
    assert (tmp_path / "exported" / "SHA256SUMS").read_text().count("\n") == 5


def test_mistakes_are_one_line(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for arguments, message in (
        ((str(folder),), "TO is missing; the arguments are FROM TO"),
        ((str(folder), str(tmp_path / "full")), "full is there already, and not an empty folder"),
        ((str(tmp_path / "none"), str(tmp_path / "new")), "none is no workdir of a run"),
        ((str(folder), str(tmp_path / "new"), "--family=clop"), "unknown family 'clop'; did you mean \"clip\"?"),
        ((str(folder), str(tmp_path / "new"), "--step=3"), "so it has no checkpoint of step 3"),
    ):
        code, output = programs.run("convert", *arguments)
        assert code == 2 and message in output and "Traceback" not in output, output
        assert not (tmp_path / "new").exists()
