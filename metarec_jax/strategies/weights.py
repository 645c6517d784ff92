"""Weights: how much each example of a support says, in the closed-form learners that rank."""

import jax
import jax.numpy as jnp

from metarec_jax.models.profile import look_up
from metarec_jax.strategies.smooth import GAIN
from metarec_jax.types import Examples, Params

DISLIKE = -0.7  # initial log weight of a dislike


def example_weights(items: int, half_life: float | None) -> Params:
    """Initial parameters of `weigh`.

    Args:
      items: rows of the catalogue.
      half_life: see `weigh`; None: examples do not fade, and there is nothing to learn of it.
    """
    found = {"weight": jnp.zeros(items), "dislike": jnp.zeros(())}
    return found if half_life is None else found | {"half_life": jnp.zeros(())}


def need_half_life(half_life: float | None) -> None:
    """Raise a `ValueError` unless it is above 0 or None."""
    if half_life is not None and not half_life > 0:
        raise ValueError(f"half_life must be above 0, got {half_life}")


def weigh(params: Params, support: Examples, half_life: float | None) -> jax.Array:
    """`[users, examples]` weights, 0 where the mask is.

        log w = weight of the item + d (1 - t) - log(2) age / h

    t is the label, 1 for a positive, age the number of examples that came after; d and h are learned.

    Args:
      params: those of `example_weights`, among others.
      support: what is known of each user; its features hold "order" where there is a half-life.
      half_life: initial h; None: no fading.
    """
    keep = support.mask > 0
    item = look_up(lambda x: params["weight"][x][..., None], support.features["item_id"], "categorical")[..., 0]
    log_weight = item + (GAIN * params["dislike"] + DISLIKE) * (1 - jnp.where(keep, support.target, 0.0))
    if half_life is not None:
        age = keep.sum(1, keepdims=True) - 1 - support.features["order"]
        log_weight -= jnp.log(2.0) / half_life * jnp.exp(GAIN * params["half_life"]) * jnp.maximum(age, 0)
    return jnp.where(keep, support.mask * jnp.exp(log_weight), 0.0)
