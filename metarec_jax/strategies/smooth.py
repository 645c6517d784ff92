"""Smooth functions of the number of examples: hyperparameters that vary with how much is known of a user."""

import jax
import jax.numpy as jnp

from metarec_jax.types import Examples

GAIN = 10.0  # parameters are stored divided by this, so that the outer learning rate of embeddings is fast enough


def smooth() -> jax.Array:
    """Return the initial parameters of `at`, for which the change is 0 everywhere."""
    return jnp.zeros(3)


def at(params: jax.Array, count: jax.Array) -> jax.Array:
    """Return the change of a hyperparameter, `[users]`, for users with `count` `[users]` examples.

    delta(n) = a + b (log(1 + n) / 2 - 1) + c (2 / (1 + n) - 0.3)
    """
    log = jnp.log1p(count)
    basis = jnp.stack([jnp.ones_like(log), log / 2 - 1, 2 / (1 + count) - 0.3], -1)
    return GAIN * basis @ params


def positives(support: Examples) -> jax.Array:
    """Return the weighted number of positive examples of each user, `[users]`."""
    return counts(support).sum(1)


def counts(support: Examples) -> jax.Array:
    """Return the contribution of each example to `positives`, `[users, examples]`: mask times target, cut to [0, 1]."""
    return jnp.where(support.mask > 0, support.mask, 0.0) * jnp.clip(support.target, 0, 1)
