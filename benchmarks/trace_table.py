"""Where the time of a compiled step goes, by the kind of kernel: from a trace and the compiled program's text."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

# Kind -> what is found in "the instruction, its kernel, the place in the model that it comes from"; the first counts.
KINDS = {
    "optimizer": r"optimizer",
    "attention": r"fmha|flash|attention/(?!(query|key|value|out)/)",
    "matrix products": r"dot|gemm|cutlass|nvjet|matmul|ynn",
    "normalisation": r"norm",
    "copies": r"copy|memcpy|memset|transpose|slice|concatenate|bitcast",
}
INSTRUCTION, PLACE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = "), re.compile(r'op_name="([^"]*)"')


def traced(step: Callable[[], None], program: str, steps: int, folder: Path) -> dict[str, float]:
    """Traces so many steps into a folder; returns milliseconds of a step, and shares, by kind.

    On a GPU it is the time of its kernels, and "idle" what is left of the step. On a CPU it is that of all threads;
    what waits for products in other threads is not counted, so shares are those of what is known.

    Args:
      step: runs one step to its end.
      program: the compiled step's text, which says where in the model an instruction comes from.
    """
    began = time.perf_counter()
    with jax.profiler.trace(str(folder)):
        for _ in range(steps):
            step()
    wall = (time.perf_counter() - began) / steps
    spent = times(folder, origins(program))
    on_gpu = jax.default_backend() == "gpu"
    total = sum(spent.values()) / steps
    metrics = {}
    for kind, seconds in spent.most_common():
        metrics[f"{kind}/milliseconds"] = 1e3 * seconds / steps
        metrics[f"{kind}/share"] = seconds / steps / (wall if on_gpu else total)
    if on_gpu:
        metrics |= {"idle/milliseconds": 1e3 * (wall - total), "idle/share": (wall - total) / wall}
    return metrics | {"step/milliseconds": 1e3 * wall}


def origins(program: str) -> dict[str, str]:
    """Instruction -> the place in the model that it comes from, "" where the compiler does not say."""
    places: dict[str, str] = {}
    for line in program.splitlines():
        if instruction := INSTRUCTION.match(line):
            place = PLACE.search(line)
            places[instruction[1]] = place[1] if place else ""
    return places


def times(folder: Path, places: dict[str, str]) -> Counter[str]:
    """Kind -> seconds of all kernels in the newest trace of a folder."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_device and "Stream" not in line.name:
                continue
            for event in line.events:
                known = dict(event.stats)
                instruction = str(known.get("hlo_op", event.name))
                if on_device or instruction in places:
                    spent[kind(f"{instruction} {event.name} {places.get(instruction, '')}")] += event.duration_ns / 1e9
    return spent


def kind(text: str) -> str:
    """The first of KINDS that fits, or "other"."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, text)), "other")
