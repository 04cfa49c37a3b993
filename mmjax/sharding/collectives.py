"""What devices pass to each other inside `jax.shard_map`."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Int, PyTree

from mmjax.sharding.rules import RULES

# The mesh axes that the rows of a batch lie along: a device's number along them is that of its block of rows.
ROW_AXES = RULES.activations["batch"]
ROWS = jax.P(ROW_AXES)


def varying(tree: PyTree[Array]) -> PyTree[Array]:
    """Marks constants as different on each device, as what is computed from a device's rows is."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, ROW_AXES, to="varying"), tree)


def ring(
    visit: Callable[[PyTree, PyTree, PyTree, Int[Array, ""]], tuple[PyTree, PyTree]],
    kept: PyTree[Array],
    sent: PyTree[Array],
    summed: PyTree[Array],
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Shows what every device sends to every device, one at a time ("Ring Attention", Liu et al. 2023, section 3).

    Call it inside `jax.shard_map`. Nothing larger than one device's part is ever held. It is not meant to be
    differentiated: that would save every device's part at every stop.

    Args:
      visit: (kept, sent, summed, number of the device that `sent` comes from) -> (kept, summed).
      kept: what a device collects about all that it sees.
      sent: what goes round as it is.
      summed: what goes round with it, and collects what the devices visited add to it.

    Returns:
      `kept`, and `summed` back on the device that sent it.
    """
    count, own = jax.lax.axis_size(ROW_AXES), jax.lax.axis_index(ROW_AXES)
    forward = [(device, (device + 1) % count) for device in range(count)]

    def move(tree: PyTree[Array]) -> PyTree[Array]:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, ROW_AXES, forward), tree)

    def stop(state: PyTree[Array], number: Int[Array, ""]) -> tuple[PyTree[Array], None]:
        kept, sent, summed = state
        kept, summed = visit(kept, sent, summed, (own - number) % count)
        return (kept, move(sent), move(summed)), None

    # The last stop stands outside the loop: `sent` need not come home.
    (kept, sent, summed), _ = jax.lax.scan(stop, (kept, sent, summed), jax.numpy.arange(count - 1))
    kept, summed = visit(kept, sent, summed, (own + 1) % count)
    return kept, move(summed)
