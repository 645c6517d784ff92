"""Tables that ranking strategies read: log popularity of items, and the result of `Strategy.fit`."""

from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.collaborative.factorise import log_popularity
from metarec_jax.data.schema import ITEM_ID
from metarec_jax.models.profile import look_up
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Features, Params


def popularity(params: Params, features: Features) -> jax.Array:
    """Return the log popularity of the items in `features`, `[...]`.

    An unknown item gets the value of an item without positives.
    """
    table = params["tables"]["log_popularity"]
    return look_up(lambda x: table[x][..., None], features[ITEM_ID], "categorical")[..., 0]


def among(scores: jax.Array, features: Features) -> jax.Array:
    """Select the scores of the items in `features` from each user's scores of all items.

    Args:
      scores: `[users, items]`.
      features: "item_id" is `[users, n]`.

    Returns:
      `[users, n]` scores.
    """

    def column(ids: jax.Array) -> jax.Array:
        return jnp.take_along_axis(scores, ids, 1)[..., None]

    return look_up(column, features[ITEM_ID], "categorical")[..., 0]


def tables(strategy: Strategy, observed: Observed) -> dict[str, Any]:
    """Build `params["tables"]` of a strategy that ranks: item features, log popularity and the result of `fit`."""
    result: dict[str, Any] = {"items": observed.features, "log_popularity": log_popularity(observed.positives())}
    return result | ({"fitted": strategy.fit(observed)} if strategy.fit else {})
