"""Catalogue: what is known of a batch of users, and scores of items that all of them share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.ranking import Known
from metarec_jax.types import Examples, Params


def features(
    items: dict[str, jax.Array], user: dict[str, jax.Array], context: dict[str, jax.Array], order: jax.Array
) -> dict[str, jax.Array]:
    """As `metarec_jax.tasks.features`, of item features `[users, n, ...]` and what each user has once."""
    shape, found = items["item_id"].shape, dict(items)
    for prefix, values in (("user", user), ("context", context)):
        for name, value in values.items():
            found[f"{prefix}/{name}"] = jnp.broadcast_to(value[:, None], shape + value.shape[1:])
    return found | {"order": jnp.broadcast_to(order, shape)}


def adapt(
    strategy: Strategy, params: Params, tables: dict[str, jax.Array], known: Known, key: jax.Array | None = None
) -> Any:
    """Each user's adapted values, a pytree of arrays `[users, ...]`.

    Args:
      strategy, params: trained.
      tables: features of all items, each `[rows, ...]`.
      known: the users.
      key: of what the strategy draws; one for all calls by default, so that serving is deterministic.
    """
    return strategy.adapt(params, support_of(tables, known), jax.random.key(0) if key is None else key)


def support_of(tables: dict[str, jax.Array], known: Known) -> Examples:
    """What is known of users, as a support set."""
    items = {name: table[known.items] for name, table in tables.items()}
    nowhere = jax.tree.map(jnp.zeros_like, known.context)  # the contexts of what users did are not known
    place = jnp.arange(known.items.shape[1], dtype=jnp.int32)
    return Examples(features(items, known.user, nowhere, place), known.target, known.weight)


def score(
    strategy: Strategy, params: Params, tables: dict[str, jax.Array], adapted: Any, known: Known, rows: jax.Array
) -> jax.Array:
    """`[users, n]` scores of the items in `rows` `[users, n]`."""
    items = {name: table[rows] for name, table in tables.items()}
    return strategy.predict(params, adapted, features(items, known.user, known.context, last(known)[:, None]))


def score_shared(
    strategy: Strategy, params: Params, adapted: Any, known: Known, items: dict[str, jax.Array]
) -> jax.Array:
    """`[users, n]` scores of items that all users share, whose features `[n, ...]` have no axis of users.

    What the strategy computes of the items alone is computed once: by its own `items`, or because `vmap` leaves
    unbatched what no user enters.
    """
    if strategy.items is not None and strategy.score is not None:
        return strategy.score(params, adapted, strategy.items(params, items))
    one = partial(score_one, strategy, False, params, items)
    return jax.vmap(lambda user: one(user)[0])((adapted, known.user, known.context, last(known)))


def score_one(
    strategy: Strategy, deviation: bool, params: Params, items: dict[str, jax.Array], user: Any
) -> tuple[jax.Array, jax.Array | None]:
    """One user's scores of shared items, `[n]`, and their deviations."""
    adapted, own, context, order = jax.tree.map(lambda x: x[None], user)
    whole = features({name: table[None] for name, table in items.items()}, own, context, order)
    scores = strategy.predict(params, adapted, whole)[0]
    if not deviation:
        return scores, None
    assert strategy.deviation is not None
    return scores, strategy.deviation(params, adapted, whole)[0]


def last(known: Known) -> jax.Array:
    """`[users]` int32 the place in time of what comes next."""
    return (known.weight > 0).sum(1).astype(jnp.int32)
