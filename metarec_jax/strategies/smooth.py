"""Smooth: numbers that depend on how much is known of a user, as smooth functions of the number of examples."""

import jax
import jax.numpy as jnp

from metarec_jax.types import Examples

GAIN = 10.0  # a parameter is its number divided by this, so that the outer optimiser of embeddings moves it fast enough


def smooth() -> jax.Array:
    """Initial parameters of `at`: no change anywhere."""
    return jnp.zeros(3)


def at(params: jax.Array, count: jax.Array) -> jax.Array:
    """`[users]` the change of a number for users with `count` `[users]` examples.

    delta(n) = a + b (log(1 + n) / 2 - 1) + c (2 / (1 + n) - 0.3)
    """
    log = jnp.log1p(count)
    basis = jnp.stack([jnp.ones_like(log), log / 2 - 1, 2 / (1 + count) - 0.3], -1)
    return GAIN * basis @ params


def positives(support: Examples) -> jax.Array:
    """`[users]` number of positive examples, each as often as its mask says."""
    return counts(support).sum(1)


def counts(support: Examples) -> jax.Array:
    """`[users, examples]` how much of a positive each example is."""
    return jnp.where(support.mask > 0, support.mask, 0.0) * jnp.clip(support.target, 0, 1)
