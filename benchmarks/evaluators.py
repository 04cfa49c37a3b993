"""Every evaluator on one model, on the embedded data set: what it finds, and how long it takes.

    python -m mmjax.main --config=configs/quickstart.py:objectives=all
    python benchmarks/evaluators.py --workdir=runs/quickstart-objectives=all --json=evaluators.json

For each evaluator, on the 400 held-out emoji:

    EVALUATOR/METRIC                  computed in float32
    EVALUATOR/seconds                 the second time, after everything is compiled
    EVALUATOR/bfloat16_difference     the largest difference of a metric where the model computes in bfloat16; of all
                                      3,944 emoji (foils: of those there are), since one of 400 is 0.0025

A model without a decoder or a matching head leaves out what needs them. Class names stand alone, without a sentence
around them, as in training. The compositional foils are captions with another skin tone.

The evaluators are also a recipe: `python -m mmjax.evaluate --evaluators=benchmarks/evaluators.py:FOLDER` writes
what they read, the foils and their images, into FOLDER.
"""

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax import runtime
from mmjax.errors import UserError

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def get_config(arg=None):
    """All evaluators; `arg` is the folder for the files that some of them read."""
    folder = Path(arg or tempfile.mkdtemp())
    write_files(folder)
    config, source, templates = configs.default(), "openmoji:en", str(folder / "templates.txt")
    config.evaluators.retrieval = configs.retrieval(source=source, match="record")
    config.evaluators.retrieval_among_all = configs.retrieval(source=source, match="record", gallery_split="all")
    config.evaluators.retrieval_reranked = configs.retrieval(
        source=source, match="record", rerank=10, rerank_weight=0.5
    )
    config.evaluators.zeroshot_names = configs.zeroshot(source=source, templates=templates)
    config.evaluators.zeroshot_subgroups = configs.zeroshot(source="openmoji:subgroup", templates=templates)
    config.evaluators.robustness = configs.robustness(source=source, templates=templates)
    config.evaluators.linear_probe = configs.linear_probe(source=source)
    config.evaluators.knn = configs.knn(source=source)
    config.evaluators.few_shot = configs.few_shot(source=source)
    config.evaluators.captions_greedy = configs.captions(source=source)
    config.evaluators.matching = configs.matching(source=source)
    config.evaluators.matching_hard = configs.matching(source=source, hard=True)
    foils = str(folder / "foils.jsonl")
    config.evaluators.compositional = configs.compositional(source=foils)
    config.evaluators.compositional_matching = configs.compositional(source=foils, by="matching")
    return config


def write_files(folder: Path) -> None:
    """Writes templates.txt, and foils.jsonl with its images: held-out emoji with one skin tone, and another one."""
    from mmjax.data.sources import open_source

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "templates.txt").write_text("{}\n")
    source, rng, lines = open_source("openmoji:en", "test"), random.Random(0), []
    for index in range(len(source)):
        record = source[index]
        (caption,) = record["captions"]["en"]
        tones = re.findall(r"[\w-]+(?= skin tone)", caption)
        if len(tones) == 1:
            other = rng.choice([tone for tone in TONES if tone != tones[0]])
            name = f"{record['key']}.png"
            (folder / name).write_bytes(record["image"])
            foil = caption.replace(f"{tones[0]} skin", f"{other} skin")
            lines.append(json.dumps({"image": name, "caption": caption, "foil": foil, "category": tones[0]}))
    (folder / "foils.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart", help="the run whose last checkpoint is evaluated")
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    import report  # beside this file, where a program finds it but a recipe does not

    runtime.configure()
    try:
        with tempfile.TemporaryDirectory() as folder:
            metrics = measure(arguments.workdir, Path(folder))
    except UserError as error:
        parser.error(str(error))
    report.print_table(metrics, f"Every evaluator on {arguments.workdir}")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def measure(workdir: str, folder: Path) -> dict[str, float]:
    """All metrics; pictures go into `folder`."""
    from mmjax import api
    from mmjax.evaluators import Evaluation

    models, found = {}, {}
    for dtype in ("float32", "bfloat16"):
        model = api.load(workdir)
        model.config.precision.compute = dtype
        models[dtype] = api.Model(model.config, model.params, model.tokenizer, model.mesh, model.step)
    needs = {"captions_greedy": "decoder", "matching": "matching", "matching_hard": "matching"}
    needs |= {"compositional_matching": "matching", "retrieval_reranked": "matching"}
    entries = get_config(folder / "files").evaluators
    kept = {
        name: entry for name, entry in entries.items() if needs.get(name, "image") in models["float32"].module.parts
    }
    held_out, every = Evaluation(kept), Evaluation({name: _of_all(entry) for name, entry in kept.items()})
    for name in kept:
        held_out.run([name], models["float32"], folder)
        start = time.perf_counter()
        metrics = held_out.run([name], models["float32"], folder)
        seconds = time.perf_counter() - start
        found |= {f"{name}/{metric.split('/')[2]}": value for metric, value in metrics.items()}
        exact, rounded = (every.run([name], model, folder) for model in models.values())
        found[f"{name}/seconds"] = round(seconds, 3)
        found[f"{name}/bfloat16_difference"] = max(abs(rounded[metric] - value) for metric, value in exact.items())
    return found


def _of_all(entry: ConfigDict) -> ConfigDict:
    """The evaluator on all emoji, where it has a split."""
    return ConfigDict(entry.to_dict() | {"split": "all"} if "split" in entry else entry)


if __name__ == "__main__":
    main()
