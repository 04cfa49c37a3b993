"""What the metrics of a large retrieval take: peak memory and time.

    python benchmarks/retrieval_memory.py
    python benchmarks/retrieval_memory.py --rows=5000 --json=retrieval_memory.json

N images and N texts (`--rows`, 100,000), a text for each image: random float32 embeddings of unit norm and width 512,
texts with so much noise that about half of 100,000 find their image first. In a process of its own that makes the
embeddings and computes every metric of the evaluator `retrieval`, in both directions:

    seconds                 of the metrics alone
    peak_megabytes          the most that the process held: Python and its packages, the embeddings, and the rest
    embeddings_megabytes    of that, both arrays of embeddings
    full_matrix_megabytes   what all similarities would take as float32, for comparison; they are never held

The figures behind `retrieval` are the metrics, to see that they are the same elsewhere.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import report

WIDTH, NOISE = 512, 5.0


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="images, and texts")
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows < 1:
        parser.error("--rows must be 1 or more")
    if arguments.child:
        print(json.dumps(measure(arguments.rows)))
        return
    command = [sys.executable, __file__, "--child", f"--rows={arguments.rows}"]
    metrics = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    report.print_table(metrics, f"Retrieval of {arguments.rows:,} texts and images, width {WIDTH}")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def measure(rows: int) -> dict[str, float]:
    """Everything, in this process."""
    import numpy as np

    from mmjax.evaluators import ranking, retrieval

    images, texts = embeddings(rows)
    owners, start = np.arange(rows), time.perf_counter()
    both = ranking.rivals(texts, images, owners, owners, both=True)
    found = {}
    for direction, rivals in zip(retrieval.DIRECTIONS, both, strict=True):
        found |= {f"retrieval/{name}": value for name, value in retrieval.summary(direction, rivals)}
    metrics = {
        "seconds": time.perf_counter() - start,
        "peak_megabytes": peak_bytes() / 1e6,
        "embeddings_megabytes": (images.nbytes + texts.nbytes) / 1e6,
        "full_matrix_megabytes": 4 * rows**2 / 1e6,
    }
    return {f"N={rows}/{name}": value for name, value in metrics.items()} | found


def embeddings(rows: int):
    """Images and texts, [rows, WIDTH] each; text i belongs to image i."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.standard_normal((rows, WIDTH), np.float32)
    texts = rng.standard_normal((rows, WIDTH), np.float32)
    texts *= NOISE
    texts += images
    for each in (images, texts):
        each /= np.sqrt(np.einsum("rd,rd->r", each, each))[:, None]
    return images, texts


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
