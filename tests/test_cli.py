"""Mistakes, as a user makes them: one line that names what and where, exit code 2, no traceback."""

import pytest

from tests import programs

TINY = "--config=tests/tiny.py"
MISTAKES = [
    ((TINY, "--config.optimzer.lr=1"), 'unknown key config.optimzer.lr: no "optimzer"; did you mean "optimizer"?'),
    (("--config", "tests/tiny.py", "--config.optimzer.lr=1"), 'did you mean "optimizer"?'),
    ((TINY, "--noconfig.seeds"), 'unknown key config.seeds: no "seeds"; did you mean "seed"?'),
    ((TINY, "--config.optimizer.learning_rate=fast"), "config.optimizer.learning_rate"),
    ((TINY, "--config.train.steps=2.5"), "config.train.steps"),
    ((TINY, "--config.streams.train.batch_size=10", "--config.mesh.data=4"), "mesh.data=4"),
    ((TINY, "--config.model.encoders.image.image_size=30"), "config.model.encoders.image.image_size: patch 14"),
    ((TINY, "--config.streams.train.source=array_record:/nowhere/*.array_record"), "no data at '/nowhere/*"),
    ((TINY, "--config.streams.train.split=trian"), 'no split "trian"'),
    ((TINY, "--config.model.encoders.text.tokenizer=/nowhere/tokenizer.json"), "cannot read the tokenizer /nowhere"),
    ((TINY, "--config.evaluators.test.split=tset"), 'config.evaluators.test: openmoji has no split "tset"'),
    ((TINY, "--config.evaluators.test.gallery_split=train"), 'config.evaluators.test: split "train" lacks 400 images'),
    ((TINY, "--config.evaluators.test.captions=('xx',)"), "config.evaluators.test: record"),
    ((TINY, "--workdri=x"), 'unknown flag --workdri; did you mean "workdir"?'),
    ((TINY, "extra"), 'unexpected argument "extra"'),
    (("--config=configs/quikstart.py",), 'no file configs/quikstart.py; did you mean "quickstart.py"?'),
    (("--config=configs/vit_b.py:smok",), 'unknown argument "smok"; known: smoke'),
    (("--config=LICENSE",), "--config: LICENSE failed: IndentationError"),
    ((), "--config is missing"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, openmoji_folder):
    if "extra" not in arguments:
        arguments = (*arguments, f"--workdir={tmp_path / 'run'}")
    code, output = programs.run("main", *arguments)
    assert code == 2, output
    assert message in output and "Traceback" not in output
    assert [line.startswith("error: ") for line in output.strip().splitlines()] == [True], output


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    code, output = programs.run("main", TINY, f"--workdir={tmp_path / 'file' / 'run'}")
    assert code == 2 and "error: cannot write into the workdir" in output and "Traceback" not in output


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    code, output = programs.run("evaluate", f"--workdir={tmp_path}")
    assert code == 2 and "config.json is damaged" in output and "Traceback" not in output


def test_debug_shows_the_traceback(tmp_path):
    code, output = programs.run("main", TINY, "--config.optimzer.lr=1", "--debug")
    assert code == 2 and "Traceback" in output and "did you mean" in output


@pytest.mark.parametrize("module", ["main", "evaluate"])
def test_help_explains_the_program(module):
    code, output = programs.run(module, "--help")
    assert code == 0 and f"python -m mmjax.{module}" in output and "--workdir" in output and "Exit codes" in output


def test_evaluate_without_a_run(tmp_path):
    for arguments, message in (
        ((), "--workdir is missing"),
        ((f"--workdir={tmp_path}",), "is no workdir of a run"),
        ((f"--workdir={tmp_path}", "--follow", "--step=3"), "--follow and --step exclude each other"),
        ((f"--workdir={tmp_path}", "--stpe=3"), 'did you mean "step"?'),
    ):
        code, output = programs.run("evaluate", *arguments)
        assert code == 2 and message in output and "Traceback" not in output
