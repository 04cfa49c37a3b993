"""Parameter tables: which tensor of another library's checkpoint is which parameter of ours.

A table is strict both ways: every tensor there has its place here, every parameter here has its tensor there, and all
shapes fit, or nothing is loaded.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from mmjax.errors import UserError
from mmjax.interop.store import Tensors

LAYER = "{}"  # in the name of a tensor: the number of the layer


class Form(NamedTuple):
    """How a tensor of theirs becomes (a layer of) a parameter of ours, and back; views where it can."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _patches_of(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _convolution_of(kernel: np.ndarray) -> np.ndarray:
    patch = round((kernel.shape[0] / 3) ** 0.5)
    return kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(np.transpose, np.transpose)  # PyTorch's kernels are [out, in]
ROW = Form(lambda x: x.reshape(1, -1), lambda x: x.reshape(-1))  # [width] there, [1, width] here
TOKEN = Form(lambda x: x[0], lambda x: x[None])  # [1, tokens, width] there
SCALAR = Form(lambda x: x.reshape(()), lambda x: x.reshape(1))  # [1] there, [] here
PATCHES = Form(_patches_of, _convolution_of)  # a convolution [out, 3, patch, patch] there


class Row(NamedTuple):
    """A parameter's path and its tensor's name, which has `LAYER` where ours is stacked over layers.

    Where they keep several of our parameters in one tensor, along its first axis, `part` says which of how many.
    """

    ours: str
    theirs: str
    form: Form = SAME
    part: tuple[int, int] = (0, 1)


class Table(NamedTuple):
    """All rows of a model.

    `fixed` are our parameters that have no tensor there, with their values; `ignored` patterns of tensors there that
    hold no parameter. `tied` are tensors that may be there, each with the name of the one that it has to be equal to.
    `renamed` are patterns of what names once had in them, and what stands there today.
    """

    rows: tuple[Row, ...]
    fixed: Mapping[str, float] = {}
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = {}
    renamed: tuple[tuple[str, str], ...] = ()


def dense(ours: str, theirs: str, bias: bool = True) -> Iterator[Row]:
    """The rows of a dense layer."""
    yield Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED)
    if bias:
        yield Row(f"{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> Iterator[Row]:
    """The rows of a layer normalisation."""
    yield Row(f"{ours}/scale", f"{theirs}.weight")
    yield Row(f"{ours}/bias", f"{theirs}.bias")


def fused(
    ours: str,
    theirs: str,
    suffixes: tuple[str, str] = (".weight", ".bias"),
    names: tuple[str, ...] = ("query", "key", "value"),
) -> Iterator[Row]:
    """The rows of query, key and value (or of these `names`) where they are one tensor there, with these ends of its
    name.
    """
    for index, name in enumerate(names):
        yield Row(f"{ours}/{name}/kernel", theirs + suffixes[0], TRANSPOSED, (index, len(names)))
        yield Row(f"{ours}/{name}/bias", theirs + suffixes[1], SAME, (index, len(names)))


def _layers(row: Row, shape: tuple[int, ...]) -> list[str]:
    return [row.theirs.replace(LAYER, str(layer)) for layer in range(shape[0])] if LAYER in row.theirs else [row.theirs]


def _their_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = shape[1:] if LAYER in row.theirs else shape
    part = row.form.theirs(np.broadcast_to(np.int8(0), one)).shape
    return (part[0] * row.part[1], *part[1:]) if row.part[1] > 1 else part


def expected(table: Table, shapes: PyTree) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors there, for a model of ours with these shapes.

    Raises:
      ValueError: the table has not each of the parameters once.
    """
    flat, rows = flatten_dict(shapes, sep="/"), [row.ours for row in table.rows]
    if sorted([*rows, *table.fixed]) != sorted(flat):
        wrong = set(flat).symmetric_difference([*rows, *table.fixed]) or {name for name in rows if rows.count(name) > 1}
        raise ValueError(f"the parameter table does not have these parameters once: {sorted(wrong)}")
    found = {}
    for row in table.rows:
        for name in _layers(row, flat[row.ours].shape):
            found[name] = _their_shape(row, flat[row.ours].shape)
    return found


def todays_names(table: Table, names: Iterable[str]) -> dict[str, str]:
    """Of tensors with these names: the name that each has today, and its own."""
    found = {}
    for name in names:
        today = name
        for pattern, replacement in table.renamed:
            today = re.sub(pattern, replacement, today)
        found[today] = name
    return found


def check(table: Table, shapes: PyTree, tensors: Tensors, source: str, family: str) -> None:
    """Raises UserError, naming all of them, where tensors are missing, unknown, or have other shapes."""
    known = tensors.names()
    todays = todays_names(table, known)
    there = {name: known[own][0] for name, own in todays.items()}
    wanted = expected(table, shapes)
    numbers = ((), (1,))  # some files have one for the other
    wanted_too = wanted | {name: wanted[other] for name, other in table.tied.items() if name in there}
    unknown = [name for name in there if name not in wanted_too and not _is_ignored(table, name)]
    wrong = {
        name: shape
        for name, shape in wanted_too.items()
        if name in there and there[name] != shape and not (there[name] in numbers and shape in numbers)
    }
    faults = {
        "missing": [name for name in wanted if name not in there],
        "unknown": unknown,
        "there by another name, too": set(known) - set(todays.values()),
        "of another shape": [f"{name} ({[*there[name]]} instead of {[*wrong[name]]})" for name in wrong],
    }
    found = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in faults.items() if names)
    if found:
        raise UserError(f"{source}: its tensors are not those of a {family} model with its config. {found}")


def _is_ignored(table: Table, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in table.ignored)


def read(
    table: Table,
    tensors: Tensors,
    shapes: PyTree,
    shardings: PyTree,
    source: str,
    finish: Callable[[str, Array, jax.sharding.Sharding], Any] = lambda path, value, sharding: value,
) -> PyTree[Array]:
    """The parameters, float32, each read straight into its place on the devices.

    A process reads only the layers that its devices hold, one tensor at a time: it never has a whole large model.

    Args:
      table, tensors: they have been compared by `check`.
      shapes, shardings: of our parameters.
      source: for messages.
      finish: (path, parameter, sharding) -> what stands in its place, called before the next one is read.

    Raises:
      UserError: a tensor holds a value that is not finite, or is not equal to the one that it is tied to.
    """
    rows, names_there = {row.ours: row for row in table.rows}, todays_names(table, tensors.names())
    for name, other in table.tied.items():
        if name in names_there and not np.array_equal(*(tensors.get(names_there[each]) for each in (name, other))):
            raise UserError(f"{source}: {name} is not equal to {other}; a model here has one tensor for both")

    def layer(row: Row, name: str) -> np.ndarray:
        tensor = tensors.get(names_there[name])
        if row.part[1] > 1:
            size = tensor.shape[0] // row.part[1]
            tensor = tensor[row.part[0] * size : (row.part[0] + 1) * size]
        value = row.form.ours(np.asarray(tensor)).astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"{source}: {name} holds a value that is not finite")
        return value

    def place(path: str, target: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> Array:
        if path in table.fixed:
            return jax.device_put(jnp.full(target.shape, table.fixed[path], jnp.float32), sharding)
        row = rows[path]
        names = _layers(row, target.shape)

        known: dict[str, np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if (key := str(index)) not in known:  # devices that hold the same share one
                if LAYER in row.theirs:
                    known[key] = np.stack([layer(row, name)[index[1:]] for name in names[index[0]]])
                else:
                    known[key] = layer(row, names[0]).reshape(target.shape)[index]  # [1] may stand for []
            return known[key]

        return jax.make_array_from_callback(target.shape, sharding, part)

    flat, places = flatten_dict(shapes, sep="/"), flatten_dict(shardings, sep="/")
    found = {path: finish(path, place(path, flat[path], places[path]), places[path]) for path in flat}
    return unflatten_dict(found, sep="/")


def write(table: Table, params: PyTree) -> dict[str, np.ndarray]:
    """The tensors there of parameters of ours (on the host), float32."""
    flat = flatten_dict(params, sep="/")
    parts: dict[str, dict[int, np.ndarray]] = {}
    for row in table.rows:
        value = np.asarray(flat[row.ours])
        names = _layers(row, value.shape)
        for name, one in zip(names, value if LAYER in row.theirs else [value], strict=True):
            parts.setdefault(name, {})[row.part[0]] = row.form.theirs(one)
    whole = {
        name: np.concatenate([own[i] for i in sorted(own)]) if len(own) > 1 else own[0] for name, own in parts.items()
    }
    return {name: np.asarray(value, np.float32, order="C") for name, value in whole.items()}
