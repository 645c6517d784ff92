"""Observed: the training users' interactions as closed-form learners read them, and the tables they are kept in."""

from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.collaborative.factorise import log_popularity
from metarec_jax.models.profile import look_up
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Features, Params


def popularity(params: Params, features: Features) -> jax.Array:
    """`[...]` log popularity of the items of some features; of an item that is new that of one nobody has chosen."""
    table = params["tables"]["log_popularity"]
    return look_up(lambda x: table[x][..., None], features["item_id"], "categorical")[..., 0]


def among(scores: jax.Array, features: Features) -> jax.Array:
    """`[users, n]` of a user's scores of all items `[users, items]` those of the items of some features."""

    def column(ids: jax.Array) -> jax.Array:
        return jnp.take_along_axis(scores, ids, 1)[..., None]

    return look_up(column, features["item_id"], "categorical")[..., 0]


def tables(strategy: Strategy, observed: Observed) -> dict[str, Any]:
    """What a strategy that ranks finds in `params["tables"]`: the catalogue, its popularity and what `fit` learns."""
    found: dict[str, Any] = {"items": observed.features, "log_popularity": log_popularity(observed.positives())}
    return found | ({"fitted": strategy.fit(observed)} if strategy.fit else {})
