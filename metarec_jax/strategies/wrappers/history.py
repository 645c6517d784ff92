"""Histories: any strategy with a model that reads what the user did before (recurrent nets, Transformers)."""

import jax
import jax.numpy as jnp

from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, History, Params, Task


def with_history(strategy: Strategy) -> Strategy:
    """`strategy`, whose model is given `History` features: each example with its user's support set as the past.

    An example of the support set carries its own place there, because it must not be scored by reading itself. The
    adapted values include the support set, which `predict` needs again. Wrapping twice is the same as once; a strategy
    with `prefixes` reads the support set itself.
    """
    if strategy.prefixes is not None:
        return strategy

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return strategy.adapt(params, reading_the_others(support), key), support

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        own, support = adapted
        return strategy.predict(params, own, reading_all(support, features))

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        query = task.query._replace(features=reading_all(task.support, task.query.features))
        return strategy.loss(params, Task(reading_the_others(task.support), query), key)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        own, support = adapted
        return strategy.deviation(params, own, reading_all(support, features))

    return strategy._replace(
        adapt=adapt, predict=predict, loss=loss, deviation=deviation if strategy.deviation else None
    )


def reading_the_others(support: Examples) -> Examples:
    """The support set whose every example has the other ones as its past."""
    if isinstance(support.features, History):
        return support
    place = jnp.broadcast_to(jnp.arange(support.mask.shape[1], dtype=jnp.int32), support.mask.shape)
    return support._replace(features=History(support.features, support, place))


def reading_all(support: Examples, features: Features) -> Features:
    """Features of examples outside the support set, all of which is their past."""
    if isinstance(features, History):
        return features
    leading = jax.tree.leaves(features)[0].shape[:2]
    return History(features, support, jnp.full(leading, -1, jnp.int32))


def joined(task: Task) -> Examples:
    """Support and query as one set, `[users, support + query, ...]`; the past of its examples stays the support set."""

    def join(support: jax.Array, query: jax.Array) -> jax.Array:
        return jnp.concatenate([support, query], axis=1)

    support, query = task
    if not isinstance(support.features, History):
        return jax.tree.map(join, support, query)
    one, two = support.features, query.features
    features = History(jax.tree.map(join, one.now, two.now), one.past, join(one.own, two.own))
    return Examples(features, join(support.target, query.target), join(support.mask, query.mask))
