"""Leaving out tokens in training, so that a Transformer has fewer to process."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


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
    tokens = x.shape[1] - always_kept
    noise = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(rng)
    kept = jnp.sort(jnp.argsort(noise, axis=1)[:, : kept_tokens(tokens, fraction)], axis=1)
    chosen = jnp.take_along_axis(x[:, always_kept:], kept[..., None], axis=1)
    return jnp.concatenate([x[:, :always_kept], chosen], axis=1) if always_kept else chosen
