"""How long many tar shards take to open, and how much memory their index takes.

    python benchmarks/tar_index.py
    python benchmarks/tar_index.py --shards=100 --json=tar_index.json

Writes `--shards` tar files of 1,000 members (500 pairs of a 1 KB image and its text) into a temporary folder, and opens
them in processes of their own: once with an empty cache, then with the index that this left, `--repeats` times.

    cold_seconds    from nothing to a source: every header is read
    warm_seconds    with the index in the cache (median)
    index_mb        what the source holds: the size of its pickle
    memory_mb       how much the process grew by opening it warm
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 500
MEASURE = """
import json, pickle, resource, sys, time
import mmjax.data.sources
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, began = resident(), time.perf_counter()
source = mmjax.data.sources.open_source(sys.argv[1])
seconds = time.perf_counter() - began
print(json.dumps([seconds, len(pickle.dumps(source)) / 1e6, (resident() - before) / 1e6, len(source)]))
"""


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(arguments.shards):
            write_shard(Path(folder) / f"{shard:05d}.tar", shard)
        cold, *warm = (measure(folder) for _ in range(1 + arguments.repeats))
    metrics = {
        "records": cold[3],
        "cold_seconds": cold[0],
        "warm_seconds": statistics.median(seconds for seconds, *_ in warm),
        "index_mb": cold[1],
        "memory_mb": statistics.median(grown for _, _, grown, _ in warm),
    }
    report.print_table(metrics, f"{arguments.shards:,} tar files of {2 * PAIRS:,} members")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def write_shard(path: Path, shard: int) -> None:
    """A tar file of 500 pairs."""
    with tarfile.open(path, "w") as tar:
        for pair in range(PAIRS):
            for extension, data in (("jpg", os.urandom(1024)), ("txt", b"a caption of some words")):
                member = tarfile.TarInfo(f"{shard:05d}{pair:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measure(folder: str) -> list[float]:
    """[seconds, MB of the index, MB that the process grew, records] of opening the shards in a new process."""
    environment = os.environ | {"MMJAX_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, f"webdataset:{folder}/*.tar"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
