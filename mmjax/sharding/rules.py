"""Which axis of which array lies along which axis of the mesh.

One table names the logical axes of every parameter; one dataclass maps logical axes to mesh
axes. Activations are constrained with `constrain`, by logical names too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

# Patterns for the end of a parameter's path -> the logical axes of its dimensions. Parameters under
# `blocks/` are stacked over the layers and have one more axis, `layers`, in front.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"patch_embed/kernel", (None, "embed")),
    (r"conv\d/kernel", (None, None, "embed")),
    (r"token_embed/embedding", ("vocab", "embed")),
    (r"position|token_type|class_token|probe|start|mask_token", (None, "embed")),
    (r"(query|key|value)/kernel", ("embed", "heads")),
    (r"(query|key|value)/bias", ("heads",)),
    (r"bias_table", (None, "heads")),
    (r"out/kernel", ("heads", "embed")),
    (r"(up|gate)/kernel", ("embed", "mlp")),
    (r"(up|gate)/bias", ("mlp",)),
    (r"down/kernel", ("mlp", "embed")),
    (r"(\w+_projection|transform|match_head|classifier|dense)/kernel", ("embed", None)),
    (r"vocab", ("vocab", "embed")),
    (r"vocab_bias", ("vocab",)),
    (r"(\w+_projection|patch_embed|conv\d|out|down|transform|match_head|classifier|dense|\w*norm\w*)/bias", (None,)),
    (r"\w*norm\w*/scale|\w+_layer_scale", (None,)),
    (r"logit_scale|logit_bias", ()),
)


@dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axis (or axes, or None for replicated)."""

    parameters: Mapping[str, str | None] = field(
        default_factory=lambda: {
            "embed": "fsdp",
            "mlp": "tensor",
            "heads": "tensor",
            "vocab": "tensor",
            "layers": None,
        }
    )
    activations: Mapping[str, str | tuple[str, ...] | None] = field(
        default_factory=lambda: {
            "batch": ("data", "fsdp"),
            "sequence": None,
            "embed": None,
            "heads": "tensor",
            "mlp": "tensor",
            "vocab": "tensor",
        }
    )

    def parameter_spec(self, axes: tuple[str | None, ...]) -> P:
        """The partition of a parameter with these logical axes."""
        return _spec(axes, self.parameters)

    def activation_spec(self, axes: tuple[str | None, ...]) -> P:
        """The partition of an activation with these logical axes."""
        return _spec(axes, self.activations)


RULES = AxisRules()


def _spec(axes: tuple[str | None, ...], mapping: Mapping) -> P:
    for axis in axes:
        if axis is not None and axis not in mapping:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(mapping)}")
    entries = [None if axis is None else mapping[axis] for axis in axes]
    used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} collide: they use mesh axes {used}")
    return P(*entries)


def logical_axes(path: str) -> tuple[str | None, ...]:
    """The logical axes of the parameter at `path` ("image/blocks/mlp/up/kernel").

    Raises:
      ValueError: no row of `PARAMETER_AXES`, or more than one, matches.
    """
    matches = [axes for pattern, axes in PARAMETER_AXES if re.search(rf"(^|/)({pattern})$", path)]
    if len(matches) != 1:
        raise ValueError(f"parameter {path!r} matches {len(matches)} rows of PARAMETER_AXES instead of one")
    return (("layers",) if "/blocks/" in path else ()) + matches[0]


def path_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as "image/blocks/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_shardings(params: PyTree, mesh: Mesh, rules: AxisRules = RULES) -> PyTree[NamedSharding]:
    """One sharding for each parameter (an array or a `jax.ShapeDtypeStruct`)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, rules.parameter_spec(logical_axes(path_name(path)))), params
    )


def batch_sharding(mesh: Mesh, rules: AxisRules = RULES) -> NamedSharding:
    """The sharding of a batch: the first axis over all data-parallel devices."""
    return NamedSharding(mesh, rules.activation_spec(("batch",)))


def constrain(x: Array, *axes: str | None, rules: AxisRules = RULES) -> Array:
    """Pins the layout of an activation, one logical name (or None) for each dimension.

    Raises:
      ValueError: unknown name, wrong number of names, colliding names, or no mesh is set
        (`with jax.set_mesh(mesh):`).
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    spec = rules.activation_spec(axes)
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError("no mesh is set: run the model inside `with jax.set_mesh(mesh):`")
    return jax.lax.with_sharding_constraint(x, spec)
