"""Examples and Task: the two pytrees that everything in this package speaks.

A user is a task. A batch holds many users; every array starts with the axes `[users, examples]`, and histories of
different lengths are padded with examples whose mask is 0. Padding never changes a loss, a gradient or a metric.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any  # a pytree of arrays
Features = Any  # a pytree of arrays, each `[users, examples, ...]` in a batch and `[examples, ...]` for one user
Apply = Callable[[Params, Features], jax.Array]  # one user's features `[examples, ...]` -> scores `[examples]`
PointwiseLoss = Callable[[jax.Array, jax.Array], jax.Array]  # scores, targets -> losses, elementwise


class Examples(NamedTuple):
    """Interactions of a batch of users.

    Attributes:
      features: pytree of arrays `[users, examples, ...]`, whatever the model reads.
      target: `[users, examples]` what the model should predict: a rating, or 1 for a click and 0 for none.
      mask: `[users, examples]` 1 for a real interaction, 0 for padding. A positive number is the weight of the example:
        one of weight 2 counts as two.
    """

    features: Features
    target: jax.Array
    mask: jax.Array


class Task(NamedTuple):
    """A batch of users: adapt to the support examples, be judged on the query examples.

    Attributes:
      support: `Examples` with arrays `[users, support examples, ...]`.
      query: `Examples` with arrays `[users, query examples, ...]`.
    """

    support: Examples
    query: Examples


class History(NamedTuple):
    """Features of examples together with what their user did before: what models that read a history get.

    Attributes:
      now: features of the examples to score, `[users, examples, ...]`.
      past: the user's support set, `Examples` with arrays `[users, past examples, ...]`.
      own: `[users, examples]` int32, the example's own place in `past`, which must not be read to score it; -1 where it
        is not in `past`.
    """

    now: Features
    past: Examples
    own: jax.Array


def masked_mean(values: jax.Array, mask: jax.Array, count: float | jax.Array = 0.0) -> jax.Array:
    """Mean of `values`, each as often as `mask` says, and of `count` zeros; 0 where nothing is."""
    kept = mask > 0
    weight = jnp.where(kept, mask, 0).astype(jnp.result_type(values, jnp.float32))
    total = weight.sum()
    return (weight * jnp.where(kept, values, 0.0)).sum() / jnp.where(total > 0, total + count, 1.0)


def mean_loss(loss: PointwiseLoss, scores: jax.Array, examples: Examples, count: float | jax.Array = 0.0) -> jax.Array:
    """Mean loss of one user's real examples: scores, target and mask `[examples]`; 0 without examples.

    A `count` adds to their number, as so many examples more whose loss is 0. Scores and targets under the mask reach
    neither the result nor its gradient, even when they are NaN or infinite.
    """
    if scores.shape != examples.target.shape:
        raise ValueError(
            f"scores are {scores.shape}, targets {examples.target.shape}: `apply` must return one score an example"
        )
    kept = examples.mask > 0
    values = loss(jnp.where(kept, scores, 0.0), jnp.where(kept, examples.target, 0.0))
    return masked_mean(values, examples.mask, count)


def normal_per_user(key: jax.Array, users: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise `[users, *shape]`; a user's does not depend on how many users there are."""
    return jax.vmap(lambda u: jax.random.normal(jax.random.fold_in(key, u), shape))(jnp.arange(users))
