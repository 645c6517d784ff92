"""Catalogue: adapt to what is known of a batch of users, and score items that all users share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.core._trace import trace
from metarec_jax.data.schema import CONTEXT, ITEM_ID, ORDER, USER, prefixed
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.ranking import Known
from metarec_jax.types import Examples, Params


def features(
    items: dict[str, jax.Array], user: dict[str, jax.Array], context: dict[str, jax.Array], order: jax.Array
) -> dict[str, jax.Array]:
    """Build features like `metarec_jax.tasks.features`, from item features `[users, n, ...]` and per-user values.

    Args:
      items: item features, each `[users, n, ...]`.
      user: attributes, each `[users, ...]`.
      context: context features, each `[users, ...]`.
      order: position in time, `[users, 1]`, `[users, n]` or anything else that broadcasts to `[users, n]`.
    """
    shape, merged = items[ITEM_ID].shape, dict(items)
    for prefix, values in ((USER, user), (CONTEXT, context)):
        for name, value in values.items():
            merged[prefix + name] = jnp.broadcast_to(value[:, None], shape + value.shape[1:])
    return merged | {ORDER: jnp.broadcast_to(order, shape)}


def adapt(
    strategy: Strategy, params: Params, tables: dict[str, jax.Array], known: Known, key: jax.Array | None = None
) -> Any:
    """Return each user's adapted values, a pytree of arrays `[users, ...]`.

    Args:
      strategy, params: a trained strategy.
      tables: features of all items, each `[rows, ...]`.
      known: the users' histories and attributes.
      key: for strategies that sample. The default is the same for all calls, so that serving is deterministic.
    """
    return strategy.adapt(params, support_of(tables, known), jax.random.key(0) if key is None else key)


def support_of(tables: dict[str, jax.Array], known: Known) -> Examples:
    """Build the support set from what is known of the users.

    Args:
      tables: features of all items, each `[rows, ...]`.
      known: arrays `[users, examples]` and `[users, ...]`.
    """
    items = {name: table[known.items] for name, table in tables.items()}
    unknown = jax.tree.map(jnp.zeros_like, known.context)
    position = jnp.arange(known.items.shape[1], dtype=jnp.int32)
    merged = features(items, known.user, unknown, position)
    merged |= prefixed(CONTEXT, known.past or {})
    return Examples(merged, known.target, known.weight)


def score(
    strategy: Strategy, params: Params, tables: dict[str, jax.Array], adapted: Any, known: Known, rows: jax.Array
) -> jax.Array:
    """Score each user's own candidate items: `[users, n]` scores of the item rows in `rows` `[users, n]`."""
    items = {name: table[rows] for name, table in tables.items()}
    return strategy.predict(params, adapted, features(items, known.user, known.context, last(known)[:, None]))


def score_shared(
    strategy: Strategy, params: Params, adapted: Any, known: Known, items: dict[str, jax.Array]
) -> jax.Array:
    """Score items that all users share, `[users, n]`; the item features `[n, ...]` have no users axis.

    The part of the score that depends on items alone is computed once: by the strategy's `items`, or because `vmap`
    leaves computations without a users axis unbatched.
    """
    if strategy.items is not None and strategy.score is not None:
        return strategy.score(params, adapted, strategy.items(params, items))
    one = partial(score_one, strategy, False, params, items)
    return jax.vmap(lambda user: one(user)[0])((adapted, known.user, known.context, last(known)))


def score_one(
    strategy: Strategy, deviation: bool, params: Params, items: dict[str, jax.Array], user: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Score shared items for one user, `[n]`; also return their deviations if `deviation`."""
    adapted, profile, context, order = jax.tree.map(lambda x: x[None], user)
    merged = features({name: table[None] for name, table in items.items()}, profile, context, order)
    scores = strategy.predict(params, adapted, merged)[0]
    if not deviation:
        return scores, None
    assert strategy.deviation is not None
    return scores, strategy.deviation(params, adapted, merged)[0]


def reads_context(strategy: Strategy, params: Params, tables: dict[str, jax.Array], known: Known) -> bool:
    """Return whether the scores depend on the context of the recommendation, as their jaxpr tells.

    Args:
      strategy, params: a trained strategy.
      tables: features of all items, each `[rows, ...]`.
      known: users; only shapes matter.
    """

    def scores(context: dict[str, jax.Array], rest: Any) -> jax.Array:
        params, tables, known, rows = rest
        known = known._replace(context=context)
        return score(strategy, params, tables, adapt(strategy, params, tables, known), known, rows)

    rows = known.items[:, :1]
    context, rest = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (known.context, (params, tables, known, rows))
    )
    program = trace(scores, context, rest)
    return not program.dependents(program.inputs[0]).isdisjoint(o for o in program.outputs if isinstance(o, int))


def last(known: Known) -> jax.Array:
    """Return the position in time of each user's next interaction, `[users]` int32."""
    return (known.weight > 0).sum(1).astype(jnp.int32)
