"""What it costs to load an exported encoder, with its parameters as arguments or as constants of the program.

    python benchmarks/exported.py
    python benchmarks/exported.py --variant=Ti/16 --weights=int8 --json=exported.json

A ViT (`--variant`, B/16) with random parameters is exported in both ways: `arguments` as `mmjax.export` does it,
`constants` with the parameters baked into the program. Each is then loaded in a process of its own, which imports no
mmjax:

    arguments/file_megabytes      on the disk
    arguments/load_seconds        reading the file and placing the parameters
    arguments/compile_seconds     of the program, for `--batch` images (8)
    arguments/call_seconds        the fastest of 3 calls
    arguments/peak_megabytes      the most that the process held: Python and jax, and all of this
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("arguments", "constants")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B/16", help="of the image tower, for images of 224 pixels")
    parser.add_argument("--weights", default="float32", help="the type of its matrices: float32, bfloat16 or int8")
    parser.add_argument("--batch", type=int, default=8, help="images of a call")
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Path(arguments.child), arguments.batch)))
        return
    import report

    from mmjax import runtime
    from mmjax.errors import UserError

    runtime.configure()
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_both(Path(folder), arguments.variant, arguments.weights)
        except UserError as error:
            parser.error(str(error))
        for way in WAYS:
            command = [sys.executable, __file__, f"--child={folder}/{way}.npz", f"--batch={arguments.batch}"]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            metrics |= {f"{way}/{name}": value for name, value in found.items()}
    report.print_table(metrics, f"An exported {arguments.variant}, {arguments.weights}")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def write_both(folder: Path, variant: str, weights: str) -> None:
    """Writes arguments.npz and constants.npz; the second has no parameters of its own."""
    import functools

    import jax
    import jax.export
    import numpy as np

    from mmjax import api, building, export, quantization
    from mmjax import config as configs
    from mmjax.sharding.mesh import make_mesh

    config, mesh = configs.default(), make_mesh(devices=jax.devices()[:1])
    config.model.encoders.image = configs.image_encoder(variant=variant, image_size=224, pooling="map")
    config.model.parts = ("image",)
    module = building.make_module(config)
    with jax.set_mesh(mesh):
        params = jax.jit(functools.partial(building.init_params, config, module))()
    model = api.Model(config, quantization.quantized(params, weights, mesh), None, mesh)
    export.encoder(model, "image", folder / "arguments.npz")
    file = np.load(folder / "arguments.npz")
    program = jax.export.deserialize(bytearray(file["program"]))
    parameters = {name: file[name] for name in file.files if name != "program"}
    baked = jax.export.export(jax.jit(lambda images: program.call(parameters, images)), platforms=program.platforms)(
        program.in_avals[-1]
    )
    np.savez(folder / "constants.npz", program=np.frombuffer(baked.serialize(), np.uint8))


def measure(path: Path, batch: int) -> dict[str, float]:
    """Loads a file, compiles and calls it, in this process."""
    import jax
    import jax.export
    import numpy as np

    start = time.perf_counter()
    file = np.load(path)
    program = jax.export.deserialize(bytearray(file["program"]))
    parameters = jax.block_until_ready(jax.device_put({name: file[name] for name in file.files if name != "program"}))
    loaded = time.perf_counter()
    inputs = ([parameters] if parameters else []) + [np.zeros((batch, 224, 224, 3), np.uint8)]
    compiled = jax.jit(program.call).lower(*inputs).compile()
    times = [time.perf_counter()]
    for _ in range(3):
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter())
    return {
        "file_megabytes": round(path.stat().st_size / 1e6, 1),
        "load_seconds": round(loaded - start, 2),
        "compile_seconds": round(times[0] - loaded, 2),
        "call_seconds": round(min(after - before for before, after in itertools.pairwise(times)), 2),
        "peak_megabytes": peak_megabytes(),
    }


def peak_megabytes() -> int:
    """The most that this program held; `getrusage` would count what its parent held when it was started."""
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(peak.split()[1]) / 1e3)


if __name__ == "__main__":
    main()
