"""Leaving out tokens in training, so that a Transformer has fewer to process."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def kept_tokens(tokens: int, fraction: float) -> int:
    """How many of `tokens` stay when `fraction` in [0, 1) of them is dropped; the number dropped is rounded down."""
    # The products of decimal fractions, such as 100 x 0.29, can lie just below the number that is meant.
    return tokens - int(tokens * fraction + 1e-6)


def drop_tokens(
    x: Float[Array, "batch tokens embed"], rng: Key[Array, " batch"], fraction: float, always_kept: int = 0
) -> Float[Array, "batch kept embed"]:
    """Keeps a random part of each row's tokens, in their order ("Scaling Language-Image Pre-training via Masking", Li
    et al. 2023, section 3).

    Args:
      x: tokens that know their places already.
      rng: a key for each row: what a row keeps depends on its key alone.
      fraction: of the tokens, in [0, 1); see `kept_tokens`.
      always_kept: so many of the first tokens (a class token) stay, and do not count.
    """
    places = kept_places(rng, x.shape[1], fraction, always_kept)
    return jnp.take_along_axis(x, places[..., None], axis=1)


def kept_places(
    rng: Key[Array, " batch"],
    tokens: int,
    fraction: float,
    always_kept: int = 0,
    valid: Bool[Array, "batch tokens"] | None = None,
) -> Int[Array, "batch kept"]:
    """Which of `tokens` each row keeps, ascending: see `drop_tokens`. Those that are not `valid` are dropped first."""
    free = tokens - always_kept
    noise = jax.vmap(lambda key: jax.random.uniform(key, (free,)))(rng)
    if valid is not None:
        noise += ~valid[:, always_kept:]
    kept = always_kept + jnp.sort(jnp.argsort(noise, axis=1)[:, : kept_tokens(free, fraction)], axis=1)
    first = jnp.broadcast_to(jnp.arange(always_kept), (len(rng), always_kept))
    return jnp.concatenate([first, kept], axis=1)
