"""Every recipe at the quickstart's size: the same data, steps and batches, several seeds.

    python benchmarks/objectives.py --json=objectives.json
    python benchmarks/objectives.py --recipes=clip_b,coca_b --seeds=1 --steps=100

Each run is `python -m mmjax.main --config=configs/RECIPE.py:quickstart` in a process of its own. `quickstart` is
configs/quickstart.py (and so is clip_b at this size), `together` its `objectives=all`: contrastive, captioning and
matching in one run. lit_b and distill_b start from, or learn from, quickstart's run of the same seed. A metric's mean
and sample standard deviation over the seeds are reported. What `python -m mmjax.evaluate` has found in a run since then
goes before what the run ended with.

    text_to_image_R@1   held-out names among the 400 held-out images, and the other way round
    ..._reranked_R@1    after the matching head has put the first ten into a new order
    exact_match         greedy captions of held-out images that are exactly their name
    step_seconds        the median over the run's reports (20 steps each) of the mean step, without the first step,
                        evaluations and checkpoints; of several seeds the least, as other programs only make it longer
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "quickstart": "quickstart.py",
    "together": "quickstart.py:objectives=all",
    "clip_b": "clip_b.py:quickstart",
    "siglip_b": "siglip_b.py:quickstart",
    "coca_b": "coca_b.py:quickstart",
    "cappa_b": "cappa_b.py:quickstart",
    "albef_b": "albef_b.py:quickstart",
    "lit_b": "lit_b.py:quickstart",
    "distill_b": "distill_b.py:quickstart",
}
# What takes another run's model, and the key of its workdir.
FROM_ANOTHER = {"lit_b": "init_from.image.source", "distill_b": "teacher.source"}
METRICS = {
    "text_to_image_R@1": "eval/test/text_to_image_R@1",
    "image_to_text_R@1": "eval/test/image_to_text_R@1",
    "text_to_image_reranked_R@1": "eval/test/text_to_image_reranked_R@1",
    "image_to_text_reranked_R@1": "eval/test/image_to_text_reranked_R@1",
    "exact_match": "eval/captions/exact_match",
}


def run(name: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Trains one recipe; returns its metrics."""
    workdir = folder / f"{name}-{seed}"
    command = [sys.executable, "-m", "mmjax.main", f"--config=configs/{RECIPES[name]}", f"--workdir={workdir}"]
    command += [f"--config.seed={seed}", f"--config.train.steps={steps}", "--config.train.log_every=20"]
    if name in FROM_ANOTHER:
        command.append(f"--config.{FROM_ANOTHER[name]}={folder / f'quickstart-{seed}'}")
    if not (workdir / "result.json").exists():
        subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads((workdir / "result.json").read_text())
    if result["step"] != steps:
        sys.exit(f"{workdir} holds a run of {result['step']} steps: choose another --folder")
    lines, later = (read_lines(workdir / name) for name in ("metrics.jsonl", "eval/metrics.jsonl"))
    found = result["metrics"]
    for line in later:
        found |= line if line["step"] == steps else {}
    seconds = [line["perf/step_seconds"] for line in lines if "perf/step_seconds" in line]
    return {key: found[metric] for key, metric in METRICS.items() if metric in found} | {
        "step_seconds": statistics.median(seconds)
    }


def read_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, where it is there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation of each metric; the least time."""
    found = {"step_seconds": min(each["step_seconds"] for each in rounds)}
    for key in (key for key in rounds[0] if key not in found):
        values = [each[key] for each in rounds]
        found[f"{key}_mean"] = statistics.mean(values)
        if len(values) > 1:
            found[f"{key}_std"] = statistics.stdev(values)
    return found


def main() -> None:
    """Trains and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not repeated")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    names = arguments.recipes.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"unknown recipe {unknown[0]}; known: {', '.join(RECIPES)}")
    if {*names} & FROM_ANOTHER.keys() and "quickstart" not in names:
        names.insert(0, "quickstart")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        rounds = {name: [] for name in names}
        for seed in range(arguments.seeds):
            for name in names:
                print(f"=== {name}, seed {seed}", file=sys.stderr, flush=True)
                rounds[name].append(run(name, seed, arguments.steps, folder))
    metrics = {f"{name}/{key}": value for name in names for key, value in summary(rounds[name]).items()}
    report.print_table(metrics, f"{arguments.steps} steps, {arguments.seeds} seeds")
    if arguments.json:
        report.write_json(arguments.json, metrics)


if __name__ == "__main__":
    main()
