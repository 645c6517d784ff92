"""Shared data types: `Examples`, `Task` and `History`, and the masked mean of losses.

A user is a task. In a batch every array starts with the axes `[users, examples]`; histories of different lengths are
padded with examples of mask 0. Padding never changes a loss, a gradient or a metric.
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
      features: pytree of arrays `[users, examples, ...]`, the model's input.
      target: `[users, examples]` label to predict: a rating, or 1 for a click and 0 for none.
      mask: `[users, examples]` weight of each example: 0 for padding, 1 for an interaction. Any positive number is
        allowed; an example of weight 2 counts as two.
    """

    features: Features
    target: jax.Array
    mask: jax.Array


class Task(NamedTuple):
    """A batch of users: a support set to adapt to and a query set to evaluate on.

    Attributes:
      support: `Examples` with arrays `[users, support examples, ...]`.
      query: `Examples` with arrays `[users, query examples, ...]`.
    """

    support: Examples
    query: Examples


class History(NamedTuple):
    """Features of the examples to score and the user's past interactions, for models that read a history.

    Attributes:
      now: features of the examples to score, `[users, examples, ...]`.
      past: the user's support set, `Examples` with arrays `[users, past examples, ...]`.
      own: `[users, examples]` int32, index of the example in `past`, or -1 if it is not there. Models must not read
        that entry when they score the example.
    """

    now: Features
    past: Examples
    own: jax.Array


def current(features: Features) -> Features:
    """Return the features of the examples to score, without the past of a `History`."""
    return features.now if isinstance(features, History) else features


def masked_mean(values: jax.Array, mask: jax.Array, count: float | jax.Array = 0.0) -> jax.Array:
    """Compute the weighted mean of `values`; 0 if no weight is positive.

        sum_i mask_i values_i / (sum_i mask_i + count),  over i with mask_i > 0

    Args:
      values: array of any shape. Values with mask 0 may be NaN or infinite.
      mask: weights, of the same shape; 0 for padding.
      count: pseudo-count in the denominator, 0 or more.
    """
    kept = mask > 0
    weight = jnp.where(kept, mask, 0).astype(jnp.result_type(values, jnp.float32))
    total = weight.sum()
    return (weight * jnp.where(kept, values, 0.0)).sum() / jnp.where(total > 0, total + count, 1.0)


def mean_loss(loss: PointwiseLoss, scores: jax.Array, examples: Examples, count: float | jax.Array = 0.0) -> jax.Array:
    """Compute the weighted mean loss of one user's examples; 0 without examples.

    Padded scores and targets affect neither the result nor its gradient, even if they are NaN or infinite.

    Args:
      loss: elementwise loss of scores and targets.
      scores: `[examples]`.
      examples: one user's `Examples`, with target and mask `[examples]`.
      count: pseudo-count in the denominator, 0 or more.

    Raises:
      ValueError: `scores` and the targets differ in shape.
    """
    if scores.shape != examples.target.shape:
        raise ValueError(
            f"scores have shape {scores.shape}, targets {examples.target.shape}; "
            "`apply` must return one score an example"
        )
    kept = examples.mask > 0
    values = loss(jnp.where(kept, scores, 0.0), jnp.where(kept, examples.target, 0.0))
    return masked_mean(values, examples.mask, count)


def normal_per_user(key: jax.Array, users: int, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard normal noise `[users, *shape]`; user u's draw does not depend on `users`."""
    return jax.vmap(lambda u: jax.random.normal(jax.random.fold_in(key, u), shape))(jnp.arange(users))
