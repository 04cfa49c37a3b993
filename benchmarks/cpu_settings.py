"""What `mmjax.runtime` is worth on a CPU: the quickstart's training step with and without its settings.

    python benchmarks/cpu_settings.py --json=cpu_settings.json

Each measurement is a process of its own; the variants alternate, and medians are reported.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import print_table, write_json

ROOT = Path(__file__).resolve().parent.parent
# Variant -> (whether freed memory is kept, whether vectors have 512 bits).
VARIANTS = {"plain": (False, False), "memory": (True, False), "vectors": (False, True), "both": (True, True)}


def measure(variant: str, steps: int) -> float:
    """The median seconds of a step in this process."""
    keep, wide = VARIANTS[variant]
    if wide:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_prefer_vector_width=512"
    from mmjax import runtime

    if keep:
        runtime._keep_freed_memory()
    import jax

    from mmjax.cli import load_recipe
    from mmjax.data import pipeline
    from mmjax.training import setup

    config = load_recipe(str(ROOT / "configs" / "quickstart.py"))
    with tempfile.TemporaryDirectory() as folder:
        run = setup.prepare(config, Path(folder))
        batches = pipeline.train_batches(config, run.sources, run.tokenizer, run.rows, 0, run.steps)
        _, batch, _ = next(batches)
        batch = jax.device_put(batch)
        with jax.set_mesh(run.mesh):
            state, seconds = run.make_state(), []
            for _ in range(steps + 3):
                began = time.perf_counter()
                state, metrics = run.train_step(state, batch, ("contrastive",))
                jax.block_until_ready(metrics)
                seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def main() -> None:
    """Measures all variants, alternating."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.steps)))
        return
    found = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.repeats):
        for variant, seconds in found.items():
            command = [sys.executable, __file__, f"--only={variant}", f"--steps={arguments.steps}"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds.append(json.loads(output.splitlines()[-1]))
    medians = {variant: statistics.median(seconds) for variant, seconds in found.items()}
    metrics = {f"{variant}/step_seconds": value for variant, value in medians.items()}
    metrics |= {
        f"{variant}/plain_over_{variant}": medians["plain"] / medians[variant] for variant in list(VARIANTS)[1:]
    }
    print_table(metrics)
    if arguments.json:
        write_json(arguments.json, metrics)


if __name__ == "__main__":
    main()
