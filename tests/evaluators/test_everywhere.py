"""Every evaluator, as users start them: on one device, on eight, in two processes; and in bfloat16."""

import shutil

import pytest

from mmjax import api
from mmjax import config as configs
from mmjax.evaluators import EVALUATORS, Evaluation
from mmjax.training.feedback import read_metrics
from tests import programs
from tests.evaluators import every

QUICKSTART = programs.ROOT / "runs" / "quickstart"


@pytest.fixture(scope="module")
def run(tmp_path_factory, openmoji_folder):
    """A run with all parts that evaluators ask for."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    code, output = programs.run("main", "--config=tests/evaluators/tiny_with_all_parts.py", f"--workdir={workdir}")
    assert code == 0, output
    return workdir


@pytest.mark.slow
@pytest.mark.sharding
def test_one_device_eight_and_two_processes_find_the_same(run, tmp_path):
    found = {}
    for name, devices, processes in (("one", 1, 1), ("eight", 8, 1), ("two processes", 4, 2)):
        workdir = tmp_path / name
        shutil.copytree(run, workdir)
        arguments = (f"--workdir={workdir}", f"--evaluators=tests/evaluators/every.py:{tmp_path / 'files'}")
        started = programs.start_several("evaluate", *arguments, devices=devices, processes=processes)
        outputs = programs.outputs_of(started)
        assert [process.returncode for process in started] == [0] * processes, outputs
        assert not any("results:" in output for output in outputs[1:])
        (found[name],) = read_metrics(workdir / "eval" / "metrics.jsonl")
    names = {name.split("/")[1] for name in found["one"] if "/" in name}
    assert {every.get_config(tmp_path / "files").evaluators[name].kind for name in names} == set(EVALUATORS)
    for name in ("eight", "two processes"):
        assert found[name].keys() == found["one"].keys()
        for metric, value in found["one"].items():
            if metric != "time":  # a last bit may exchange two of 400 neighbours
                assert found[name][metric] == pytest.approx(value, rel=1e-3, abs=2 / 400), (name, metric)


def test_a_model_of_no_run_is_evaluated_into_another_folder(run, tmp_path):
    before = sorted(run.rglob("*"))
    model = f"--init={run / 'checkpoints' / '4'}"
    code, output = programs.run("evaluate", model, "--evaluators=tests/tiny.py", f"--out={tmp_path / 'found'}")
    assert code == 0 and "evaluating step 4" in output, output
    assert sorted(run.rglob("*")) == before
    (line,) = read_metrics(tmp_path / "found" / "metrics.jsonl")
    assert line["step"] == 4 and "eval/test/text_to_image_R@1" in line
    for arguments, message in (
        ((model,), "--init=MODEL goes with --out=FOLDER"),
        ((model, f"--workdir={run}", f"--out={tmp_path}"), "--init and --workdir exclude each other"),
        (("--init=nowhere", f"--out={tmp_path}"), "nowhere is no workdir of a run"),
        ((f"--init={run / 'checkpoints' / '3'}", f"--out={tmp_path}"), "no checkpoint of step 3; it has: 4"),
    ):
        code, output = programs.run("evaluate", *arguments)
        assert code == 2 and message in output and "Traceback" not in output, output


@pytest.mark.skipif(not (QUICKSTART / "result.json").exists(), reason="runs/quickstart is not there: train it first")
def test_bfloat16_finds_what_float32_finds():
    source = {"source": "openmoji:en", "split": "all"}
    evaluation = Evaluation(
        {
            "retrieval": configs.retrieval(match="record", **source),
            "zeroshot": configs.zeroshot(**source),
            "knn": configs.knn(**source),
        }
    )
    found = []
    for dtype in ("float32", "bfloat16"):
        model = api.load(QUICKSTART)
        model.config.precision.compute = dtype
        model = api.Model(model.config, model.params, model.tokenizer, model.mesh)
        found.append(evaluation.run(["retrieval", "zeroshot", "knn"], model, QUICKSTART))
    assert found[0] != found[1]
    assert found[1].keys() == found[0].keys()
    for name, value in found[0].items():  # shares are of 1; a rank is of 3,544
        margin = {"rel": 0.005} if name.endswith("_rank") else {"abs": 0.002}
        assert found[1][name] == pytest.approx(value, **margin), name
