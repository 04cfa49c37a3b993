"""The separate eval loop, and the model that a run leaves behind."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import explain
from mmjax.data import image as image_ops
from mmjax.data.sources import open_source
from mmjax.errors import UserError
from mmjax.training.feedback import read_metrics
from tests import programs

ARGUMENTS = (
    "--config=tests/tiny.py:12",
    "--config.train.checkpoint_every=4",
    "--config.train.max_to_keep=5",
    "--config.train.best_metric=eval/test/text_to_image_mean_rank",
    "--config.train.best_mode=min",
)


@pytest.fixture(scope="module")
def followed(tmp_path_factory, openmoji_folder):
    """A run, and a follower that started before it."""
    workdir = tmp_path_factory.mktemp("followed") / "run"
    follower = programs.start("evaluate", f"--workdir={workdir}", "--follow")
    code, output = programs.run("main", *ARGUMENTS, "--config.evaluators.test.every=4", f"--workdir={workdir}")
    assert code == 0, output
    followed, _ = follower.communicate(timeout=300)
    assert follower.returncode == 0, followed
    return workdir, followed


@pytest.mark.slow
def test_following_evaluates_every_checkpoint_as_the_trainer_does(followed):
    workdir, output = followed
    assert "the run is finished" in output
    own = {line["step"]: line for line in read_metrics(workdir / "eval" / "metrics.jsonl")}
    trainer = {line["step"]: line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" not in line}
    assert sorted(own) == sorted(trainer) == [4, 8, 12]
    for step, line in trainer.items():
        metrics = {name: value for name, value in line.items() if name.startswith("eval/")}
        assert metrics and metrics == {name: own[step][name] for name in metrics}
    assert list((workdir / "eval").glob("events.out.tfevents*"))
    assert json.loads((workdir / "environment.json").read_text())["processes"] == 1
    metric = "eval/test/text_to_image_mean_rank"
    best = min(own.values(), key=lambda line: line[metric])
    assert json.loads((workdir / "eval" / "best.json").read_text()) == {"step": best["step"], metric: best[metric]}


@pytest.mark.slow
def test_following_again_has_nothing_to_do(followed):
    workdir, _ = followed
    before = (workdir / "eval" / "metrics.jsonl").read_bytes()
    code, output = programs.run("evaluate", f"--workdir={workdir}", "--follow")
    assert code == 0 and "evaluating" not in output
    assert (workdir / "eval" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_all_checkpoints_are_evaluated_by_the_evaluators_of_another_recipe(followed, tmp_path):
    workdir, _ = followed
    recipe = tmp_path / "more.py"
    recipe.write_text(
        "from mmjax import config as configs\nfrom tests import tiny\n\n\ndef get_config(arg='0'):\n"
        "    config = tiny.get_config()\n    config.evaluators.wide = configs.retrieval(\n"
        "        source='openmoji:en', match='record', gallery_split='all', rerank=int(arg))\n    return config\n"
    )
    arguments = (f"--workdir={workdir}", "--all", f"--evaluators={recipe}")
    code, output = programs.run("evaluate", *arguments)
    assert code == 0 and output.count("evaluating step") == 3, output
    lines = read_metrics(workdir / "eval" / "metrics.jsonl")[-3:]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:  # and what is known already is not found again
        assert "eval/wide/text_to_image_R@1" in line and not any(name.startswith("eval/test/") for name in line)
    code, output = programs.run("evaluate", *arguments)
    assert code == 0 and "evaluating" not in output and "nothing is left to evaluate" in output
    for mistake, message in (
        (f"--evaluators={recipe}:5", "config.evaluators.wide: no objective trains what it needs: matching"),
        (
            "--evaluators=configs/quickstart.py",
            "evaluators.test of configs/quickstart.py is another one than the run's",
        ),
        ("--evaluators=nowhere.py", "--evaluators: no file nowhere.py"),
        ("--step=4", "--all and --step exclude each other"),
    ):
        code, output = programs.run("evaluate", *arguments[:2], mistake)
        assert code == 2 and message in output, output


@pytest.mark.slow
def test_one_step_is_evaluated_by_number(followed):
    workdir, _ = followed
    code, output = programs.run("evaluate", f"--workdir={workdir}", "--step=8")
    assert code == 0 and "evaluating step 8" in output and "text to image" in output
    code, output = programs.run("evaluate", f"--workdir={workdir}", "--step=9")
    assert code == 2 and "no checkpoint of step 9; it has: 4, 8, 12" in output


@pytest.mark.slow
def test_a_run_is_loaded_and_used_in_five_lines(followed, tmp_path):
    workdir, _ = followed
    record = open_source("openmoji", "test")[0]
    pixels = image_ops.decode(record["image"])
    path = tmp_path / "emoji.png"
    Image.fromarray(pixels).save(path)

    model = mmjax.load(workdir)
    images = model.encode_image([str(path), Image.open(path), pixels, path])
    texts = model.encode_text(["a dog", record["captions"]["en"][0], "никогда не виденное слово"])
    similarity = model.similarity(images, texts)

    assert images.shape == (4, 16) and images.dtype == np.float32
    for row in images[1:]:
        np.testing.assert_array_equal(row, images[0])
    np.testing.assert_allclose((texts**2).sum(axis=1), 1, rtol=1e-5)
    assert similarity.shape == (4, 3) and ((similarity > 0) & (similarity < 1)).all()
    learned = model.params["logit_scale"], model.params["logit_bias"]
    logit = np.exp(learned[0]) * images[0] @ texts[1] + learned[1]
    assert similarity[0, 1] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-4)
    clear = Image.new("RGBA", (9, 9), (200, 0, 0, 0))
    clear.save(tmp_path / "clear.png")  # transparency is white, whichever way the image comes
    both = model.encode_image([clear, tmp_path / "clear.png", np.full((9, 9, 3), 255, np.uint8)])
    assert (both[0] == both[1]).all() and (both[0] == both[2]).all()
    with pytest.raises(UserError, match="uint8"):
        model.encode_image([pixels / 255])
    assert model.encode_text([]).shape == (0, 16)
    with pytest.raises(UserError, match="cannot read the image"):
        model.encode_image(["/nowhere.png"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text.png: 8 bytes cannot be decoded"):
        model.encode_image([tmp_path / "text.png"])


@pytest.mark.slow
def test_held_out_pairs_of_the_last_checkpoint_are_explained(followed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(followed[0], workdir)
    explain.save_of_run(workdir, count=3)
    folder = workdir / "eval" / "explanations"
    code, output = programs.run("evaluate", f"--workdir={workdir}", "--report")
    assert code == 0 and output == f"report: {workdir}/eval/report.html\n"
    page = (workdir / "eval" / "report.html").read_text()
    assert page.count("What the model looked at") == 3 and "none were made" not in page
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"00000012-{n}.{kind}" for n in range(3) for kind in ("json", "png")]
    source = open_source("openmoji:en", "test")
    assert json.loads(files[0].read_text())["title"].startswith(source[0]["captions"]["en"][0])
    before = [path.stat().st_mtime_ns for path in files]
    explain.save_of_run(workdir)
    assert [path.stat().st_mtime_ns for path in files] == before
    shutil.rmtree(workdir / "checkpoints" / "12")
    explain.save_of_run(workdir, count=1)
    assert sorted(path.name for path in folder.iterdir()) == ["00000008-0.json", "00000008-0.png"]


@pytest.mark.slow
def test_batches_of_any_size_encode_the_same(followed):
    model = mmjax.load(followed[0])
    texts = [f"number {n}" for n in range(300)]
    together = model.encode_text(texts)
    np.testing.assert_allclose(together[290:], model.encode_text(texts[290:]), atol=1e-6)


def test_a_softmax_model_gives_a_distribution_over_texts(tmp_path, openmoji_folder):
    code, output = programs.run(
        "main",
        "--config=tests/tiny.py:2",
        "--config.objectives.contrastive.kind=softmax",
        "--config.optimizer.warmup=1",
        f"--workdir={tmp_path}",
    )
    assert code == 0, output
    model = mmjax.load(tmp_path)
    similarity = model.similarity(model.encode_text(["x", "y"]), model.encode_text(["a", "b", "c"]))
    np.testing.assert_allclose(similarity.sum(axis=1), 1, rtol=1e-5)
    assert "eval/test/image_to_text_R@1" in json.loads((tmp_path / "result.json").read_text())["metrics"]
