"""Support weights: how much each support example counts in the closed-form strategies that rank."""

import jax
import jax.numpy as jnp

from metarec_jax.data.schema import ITEM_ID, ORDER
from metarec_jax.models.profile import look_up
from metarec_jax.strategies.smooth import GAIN
from metarec_jax.types import Examples, Params

DISLIKE = -0.7  # initial log weight of a dislike
ITEM_WEIGHT, DISLIKE_WEIGHT = "weight", "dislike"  # names of the parameters; the first has one number for each item


def example_weights(items: int, half_life: float | None) -> Params:
    """Return the initial parameters of `weigh`.

    Args:
      items: number of rows in the catalogue.
      half_life: see `weigh`; None: examples do not decay, and no half-life is learned.
    """
    params = {ITEM_WEIGHT: jnp.zeros(items), DISLIKE_WEIGHT: jnp.zeros(())}
    return params if half_life is None else params | {"half_life": jnp.zeros(())}


def need_half_life(half_life: float | None) -> None:
    """Validate `half_life`: None or above 0.

    Raises:
      ValueError: it is 0 or less.
    """
    if half_life is not None and not half_life > 0:
        raise ValueError(f"half_life must be above 0, or None for no decay; got {half_life}")


def weigh(params: Params, support: Examples, half_life: float | None) -> jax.Array:
    """Return the weight of each support example, `[users, examples]`; 0 where masked.

        log w = weight of the item + d (1 - t) - log(2) age / h

    t is the label (1 for a positive), age the number of later examples; the item weights, d and h are learned.

    Args:
      params: contains the parameters made by `example_weights`.
      support: each user's support set; its features include "order" if there is a half-life.
      half_life: initial h; None: no decay.
    """
    keep = support.mask > 0
    item_weight = look_up(lambda x: params[ITEM_WEIGHT][x][..., None], support.features[ITEM_ID], "categorical")[..., 0]
    log_weight = item_weight + (GAIN * params[DISLIKE_WEIGHT] + DISLIKE) * (1 - jnp.where(keep, support.target, 0.0))
    if half_life is not None:
        age = keep.sum(1, keepdims=True) - 1 - support.features[ORDER]
        log_weight -= jnp.log(2.0) / half_life * jnp.exp(GAIN * params["half_life"]) * jnp.maximum(age, 0)
    return jnp.where(keep, support.mask * jnp.exp(log_weight), 0.0)
