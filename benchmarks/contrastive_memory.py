"""How much memory the contrastive losses take on each of 8 devices, from 1,024 pairs to a million.

    python benchmarks/contrastive_memory.py
    python benchmarks/contrastive_memory.py --json=contrastive_memory.json
    python benchmarks/contrastive_memory.py --peers= --largest=65536

A figure is what the value of one loss and its gradient (with respect to embeddings, scale and bias) need on one device
at once, embeddings and gradients included: float32 embeddings of width 512, the batch over 8 devices. Nothing is
computed, so any machine can tell.

    sigmoid, softmax                the losses of mmjax, which go round the devices
    naive_sigmoid, naive_softmax    the plain formulas, distributed by the compiler: each device has the rows of its own
                                    images against all texts
    open_clip_sigmoid               open_clip's SigLipLoss, whose devices exchange texts with their neighbours

For the first four the compiler says it: arguments, results and temporaries of the program compiled for 8 virtual CPU
devices. The peer runs on PyTorch's fake tensors, which have a size and no content, in a fake process group of 8; a
storage counts from its first appearance until it is freed, and the largest sum is the figure. `saved_bytes_per_device`
is the part of it that automatic differentiation keeps for the backward pass.

`exponent` is the slope of log bytes over log B between the two largest batches: 1 grows like the batch, 2 like the
number of pairs. What cannot be compiled is left out, and the program says so. The peer needs what
benchmarks/quickstart.py needs. Exit code 2: a package of it is not installed.
"""

import argparse
import math
import os
import sys
import weakref
from collections.abc import Callable

import report
from quickstart import NEEDED, import_torchvision

DEVICES, WIDTH = 8, 512
SIZES = [2**power for power in range(10, 21, 2)]
SCALE, BIAS = 10.0, -10.0


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    needed = [package for peer in arguments.peers for package in NEEDED[peer]]
    if not report.installed(needed, "see benchmarks/quickstart.py, or use --peers="):
        return 2
    sizes = [size for size in SIZES if size <= arguments.largest]
    metrics = mmjax_bytes(sizes)
    if arguments.peers:
        metrics |= open_clip_bytes(sizes)
    for name in dict.fromkeys(key.partition("/")[0] for key in metrics):
        found = [size for size in sizes if f"{name}/B={size}/bytes_per_device" in metrics][-2:]
        if len(found) == 2:
            small, large = (metrics[f"{name}/B={size}/bytes_per_device"] for size in found)
            metrics[f"{name}/exponent"] = math.log(large / small) / math.log(found[1] / found[0])
    report.print_table(metrics, f"Contrastive losses on {DEVICES} devices, width {WIDTH}")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; `peers` becomes a list of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="leave out larger batches than this")
    parser.add_argument("--peers", default="open_clip", help="comma-separated; empty for none")
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    arguments.peers = report.chosen(parser, "peer", arguments.peers, ("open_clip",))
    if arguments.largest < SIZES[0]:
        parser.error(f"--largest must be {SIZES[0]} or more")
    return arguments


def mmjax_bytes(sizes: list[int]) -> dict[str, int]:
    """The bytes on one device of mmjax's losses and of the plain formulas, as the compiler plans them."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from mmjax.objectives import ring
    from mmjax.sharding.mesh import make_mesh
    from mmjax.sharding.rules import batch_sharding

    losses = {
        "sigmoid": lambda image, text, scale, bias: ring.sigmoid(image, text, scale, bias)[0],
        "softmax": lambda image, text, scale, bias: ring.softmax(image, text, scale)[0],
        "naive_sigmoid": naive_sigmoid,
        "naive_softmax": naive_softmax,
    }
    metrics, mesh = {}, make_mesh(DEVICES)
    with jax.set_mesh(mesh):
        for name, loss in losses.items():
            for size in sizes:
                try:
                    metrics[f"{name}/B={size}/bytes_per_device"] = compiled_bytes(loss, size, batch_sharding(mesh))
                except (jax.errors.JaxRuntimeError, MemoryError) as error:
                    print(f"{name} with B={size} cannot be compiled: {str(error).splitlines()[0]}", file=sys.stderr)
    return metrics


def naive_sigmoid(image, text, scale, bias):
    """The sigmoid loss as a formula."""
    import jax

    logits = rows_of_own_images(image @ text.T) * scale + bias
    return (jax.nn.softplus(logits).sum() - jax.numpy.trace(logits)) / len(logits)


def naive_softmax(image, text, scale, bias):
    """The softmax loss as a formula."""
    import jax

    logits = rows_of_own_images(image @ text.T) * scale
    normalizers = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return (normalizers / 2 - jax.numpy.diagonal(logits)).mean()


def rows_of_own_images(similarities):
    """Lays the matrix over the devices like the images."""
    from mmjax.sharding.rules import constrain

    return constrain(similarities, "batch", None)


def compiled_bytes(loss: Callable, size: int, sharding) -> int:
    """Arguments, results and temporaries of value and gradient on one device."""
    import jax

    rows = jax.ShapeDtypeStruct((size, WIDTH), "float32", sharding=sharding)
    scalar = jax.ShapeDtypeStruct((), "float32")
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    memory = gradient.lower(rows, rows, scalar, scalar).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def open_clip_bytes(sizes: list[int]) -> dict[str, int]:
    """The bytes on one device of open_clip's sigmoid loss with its defaults: the largest sum, and what is saved."""
    import_torchvision()
    import torch
    from open_clip.loss import SigLipLoss
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=DEVICES, store=FakeStore())
    metrics = {}
    for size in sizes:
        live, saved = LiveStorages(), {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with FakeTensorMode(), counting(live), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            image, text = (torch.empty(size // DEVICES, WIDTH, requires_grad=True) for _ in range(2))
            scale, bias = (torch.tensor(value, requires_grad=True) for value in (SCALE, BIAS))
            SigLipLoss(rank=0, world_size=DEVICES)(image, text, scale, bias).backward()
        metrics[f"open_clip_sigmoid/B={size}/bytes_per_device"] = live.largest
        metrics[f"open_clip_sigmoid/B={size}/saved_bytes_per_device"] = sum(saved.values())
    torch.distributed.destroy_process_group()
    return metrics


class LiveStorages:
    """The bytes of the storages that there are, now and at most."""

    def __init__(self):
        self.now = self.largest = 0
        self._seen = weakref.WeakSet()

    def note(self, storage) -> None:
        """Counts a storage until it is freed."""
        if storage not in self._seen:
            self._seen.add(storage)
            weakref.finalize(storage, self._free, storage.nbytes())
            self.now += storage.nbytes()
            self.largest = max(self.largest, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


def counting(live: LiveStorages):
    """A context in which the results of every PyTorch operation are noted."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            results = operator(*arguments, **(options or {}))
            for result in tree_leaves(results):
                if isinstance(result, torch.Tensor):
                    live.note(result.untyped_storage())
            return results

    return Counting()


if __name__ == "__main__":
    sys.exit(main())
