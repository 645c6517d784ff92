"""The outer loop: meta-loss over a batch of users, its gradient, and one meta-step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.tasks import Examples, Params, PointwiseLoss, Task, masked_mean, mean_loss

Loss = Callable[[Params, Task, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def query_loss(scores: jax.Array, query: Examples, loss: PointwiseLoss) -> jax.Array:
    """Mean over users of each user's mean query loss; users without a query example do not count.

    Args:
      scores: `[users, examples]`.
      query: `Examples` with arrays `[users, examples, ...]`.
      loss: elementwise loss of scores and targets.
    """
    per_user = jax.vmap(partial(mean_loss, loss))(scores, query)
    return masked_mean(per_user, jnp.any(query.mask > 0, axis=-1))


def meta_step(loss: Loss, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """One step of meta-training as a pure function: jit it, and donate the first two arguments.

    Args:
      loss: `loss(params, task, key) -> (scalar, aux)`, the loss of a strategy. Its gradient is the meta-gradient.
      optimizer: any optax transformation.

    Returns:
      `step(params, state, task, key) -> (params, state, aux)`, where `state` starts as `optimizer.init(params)` and
      `aux` is the loss's own with `loss` added, a scalar.
    """

    def step(params: Params, state: Any, task: Task, key: jax.Array) -> tuple[Params, Any, dict[str, jax.Array]]:
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, task, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, {**aux, "loss": value}

    return step
