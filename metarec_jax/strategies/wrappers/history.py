"""Histories: run any strategy on a model that reads the user's support set (recurrent networks, Transformers)."""

import jax
import jax.numpy as jnp

from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, History, Params, Task


def with_history(strategy: Strategy) -> Strategy:
    """Wrap `strategy` so that its model gets `History` features: each example with its user's support set as the past.

    A support example carries its own position in the past, because it must not be scored by reading itself. The adapted
    values include the support set, which `predict` needs again. Wrapping twice has no further effect. A strategy with
    `prefixes` reads the support set itself and is returned unchanged.
    """
    if strategy.prefixes is not None:
        return strategy

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return strategy.adapt(params, reading_the_others(support), key), support

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        inner, support = adapted
        return strategy.predict(params, inner, reading_all(support, features))

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        query = task.query._replace(features=reading_all(task.support, task.query.features))
        return strategy.loss(params, Task(reading_the_others(task.support), query), key)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        inner, support = adapted
        return strategy.deviation(params, inner, reading_all(support, features))

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        assert strategy.sample is not None
        inner, support = adapted
        return strategy.sample(params, inner, keys, strength), support

    return strategy._replace(
        adapt=adapt,
        predict=predict,
        loss=loss,
        deviation=deviation if strategy.deviation else None,
        sample=sample if strategy.sample else None,
    )


def reading_the_others(support: Examples) -> Examples:
    """Return the support set with `History` features: the past of each example is all the others."""
    if isinstance(support.features, History):
        return support
    position = jnp.broadcast_to(jnp.arange(support.mask.shape[1], dtype=jnp.int32), support.mask.shape)
    return support._replace(features=History(support.features, support, position))


def reading_all(support: Examples, features: Features) -> Features:
    """Return `History` features of examples outside the support set: the past of each is the whole support set."""
    if isinstance(features, History):
        return features
    shape = jax.tree.leaves(features)[0].shape[:2]
    return History(features, support, jnp.full(shape, -1, jnp.int32))


def joined(task: Task) -> Examples:
    """Concatenate support and query, `[users, support + query, ...]`; the past of all examples is the support set."""

    def join(support: jax.Array, query: jax.Array) -> jax.Array:
        return jnp.concatenate([support, query], axis=1)

    support, query = task
    if not isinstance(support.features, History):
        return jax.tree.map(join, support, query)
    before, after = support.features, query.features
    features = History(jax.tree.map(join, before.now, after.now), before.past, join(before.own, after.own))
    return Examples(features, join(support.target, query.target), join(support.mask, query.mask))
