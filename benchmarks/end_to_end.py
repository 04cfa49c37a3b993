"""Examples per second of whole training runs, from JPEG files to updated weights, and how long a step waits for data.

    python benchmarks/end_to_end.py --models=quickstart,Ti/16,S/16 --json=end_to_end.json
    python benchmarks/end_to_end.py --models=B/16 --batch=1024 --steps=60 --workers=8 --photos=flickr8k_train.tar

`python -m mmjax.main` runs in a process of its own and an empty workdir: configs/quickstart.py with its own data and
batch; the other models are configs/siglip_b.py with other towers, on the 1,024 JPEG files of 500 x 375 pixels in tar
files that benchmarks/input_pipeline.py makes (of photographs, with `--photos`), in random crops to 224 pixels. Of
each, as in `Ti16/cores_used`:

    examples_per_second     after the first `--log-every` steps, which compile and fill the buffers
    data_wait_fraction      of that time, what was spent waiting for a batch while the device had nothing to do
    cores_used              processor seconds of the run and its workers, a second, from the first report to the last;
                            on a CPU this includes the training itself
    first_step_seconds      from the launch of the program to the end of the first step: imports, data, compilation

Exit code 1: a run failed; its output is shown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from input_pipeline import write_files

ROOT = Path(__file__).resolve().parent.parent
# Model -> (variants of the towers, width of the embeddings).
MODELS = {
    "quickstart": None,
    "Ti/16": ("Ti/16", "Ti", 192),
    "S/16": ("S/16", "S", 384),
    "B/16": ("B/16", "B", 768),
    "L/16": ("L/16", "L", 1024),
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(arguments.data or folder) / "small"
        if any(MODELS[model] for model in arguments.models):
            write_files(data, "small", arguments.photos)
        for model in arguments.models:
            found = run(command(model, arguments, data), Path(folder) / model.replace("/", "-"))
            metrics |= report.of_model(model, found)
    report.print_table(metrics, "Whole runs")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; `models` becomes a list of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="quickstart,Ti/16,S/16", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batch", type=int, default=64, help="of all models but the quickstart")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--log-every", type=int, default=4, help="steps between two reports")
    parser.add_argument("--threads", type=int, default=2, help="config.loader.threads")
    parser.add_argument("--workers", type=int, default=0, help="config.loader.workers")
    parser.add_argument("--photos", help="a tar file with images to make the data of")
    parser.add_argument("--data", help="keep the data in this folder; what an earlier run left there is used again")
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    arguments.models = report.chosen(parser, "model", arguments.models, MODELS)
    every = arguments.log_every
    if arguments.batch < 1 or every < 2 or arguments.steps % every or arguments.steps < 3 * every:
        parser.error("--batch must be 1 or more, --log-every 2 or more, --steps three times that, or four times, ...")
    return arguments


def command(model: str, arguments: argparse.Namespace, data: Path) -> list[str]:
    """The run of a model, without its workdir."""
    settings = {
        "train.steps": arguments.steps,
        "train.log_every": arguments.log_every,
        "train.checkpoint_every": arguments.steps,
        "optimizer.warmup": 1.0,
        "loader.threads": arguments.threads,
        "loader.workers": arguments.workers,
    }
    recipe = "configs/quickstart.py"
    if sizes := MODELS[model]:
        recipe = "configs/siglip_b.py"
        image, text, width = sizes
        settings |= {
            "model.encoders.image.variant": image,
            "model.encoders.text.variant": text,
            "model.embed_dim": width,
            "streams.train.source": f"webdataset:{data}/*.tar",
            "streams.train.batch_size": arguments.batch,
            "streams.train.preprocess.resize": "inception_crop",
            "streams.train.preprocess.crop_min_area": 0.9,
        }
    words = [sys.executable, "-m", "mmjax.main", f"--config={recipe}"]
    return words + [f"--config.{key}={value}" for key, value in settings.items()]


def run(words: list[str], workdir: Path) -> dict[str, float]:
    """Runs a command with a workdir, and watches it.

    Raises:
      SystemExit: it fails.
    """
    began, environment = time.time(), report.own_environment(ROOT)
    seen: list[tuple[float, float]] = []  # at each report: the time, and the processor seconds until then
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*words, f"--workdir={workdir}"], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            if len(reports(workdir)) > len(seen):
                seen.append((time.time(), report.processor_seconds(process.pid)))
            time.sleep(0.05)
        if process.returncode:
            output.seek(0)
            print(output.read(), file=sys.stderr)
            sys.exit(1)
    start, *others = reports(workdir)
    steps, waits = ([line[f"perf/{name}"] for line in others] for name in ("step_seconds", "data_wait_fraction"))
    batch = start["perf/examples_per_second"] * start["perf/step_seconds"]
    (first, used_first), (last, used_last) = seen[0], seen[-1]
    return {
        "examples_per_second": batch / statistics.mean(steps),
        "data_wait_fraction": statistics.fmean(waits, steps),
        "cores_used": (used_last - used_first) / (last - first),
        "first_step_seconds": start["time"] - start["perf/step_seconds"] * (start["step"] - 1) - began,
    }


def reports(workdir: Path) -> list[dict[str, float]]:
    """The reports of training that are in a workdir so far."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in found if "perf/examples_per_second" in line]


if __name__ == "__main__":
    sys.exit(main())
