"""Members: several strategies run as one, with one score and one loss per member; the basis of ensembles."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, Task


class Members(NamedTuple):
    """Strategies side by side: like `Strategy`, with one score and one loss per member.

    Attributes:
      init: `init(key) -> params`.
      adapt: `adapt(params, support, key) -> adapted`.
      scores: `scores(params, adapted, features) -> [members, users, examples]`.
      loss: `loss(params, task, key) -> ([members], aux)`; in aux, counts are summed and other values averaged.
      deviations: `deviations(params, adapted, features) -> [members, users, examples]`; None unless all have one.
      sample: `sample(params, adapted, keys, strength) -> adapted`; None unless all have one.
      labelled: see `Strategy`; the same for all members.
    """

    init: Callable[[jax.Array], Params]
    adapt: Callable[[Params, Examples, jax.Array], Adapted]
    scores: Callable[[Params, Adapted, Features], jax.Array]
    loss: Callable[[Params, Task, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    deviations: Callable[[Params, Adapted, Features], jax.Array] | None
    sample: Callable[[Params, Adapted, jax.Array, jax.Array], Adapted] | None
    labelled: bool


def copies(strategy: Strategy, members: int) -> Members:
    """Build copies of one strategy, with separate initial parameters.

    Parameters are `[members, ...]`, adapted values `[users, members, ...]`.
    """

    def init(key: jax.Array) -> Params:
        return jax.vmap(strategy.init)(jax.random.split(key, members))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        keys = jax.random.split(key, members)
        return jax.vmap(strategy.adapt, (0, None, 0), out_axes=1)(params, support, keys)

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        values, aux = jax.vmap(strategy.loss, (0, None, 0))(params, task, jax.random.split(key, members))
        return values, jax.tree.map(_pooled, aux)

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        assert strategy.sample is not None
        split = jax.vmap(lambda key: jax.random.split(key, members), out_axes=1)(keys)
        return jax.vmap(strategy.sample, (0, 1, 0, None), out_axes=1)(params, adapted, split, strength)

    scores, deviations = (f and jax.vmap(f, (0, 1, None)) for f in (strategy.predict, strategy.deviation))
    assert scores is not None
    return Members(init, adapt, scores, loss, deviations, sample if strategy.sample else None, strategy.labelled)


def several(strategies: Sequence[Strategy]) -> Members:
    """Combine different strategies; parameters and adapted values are lists.

    Raises:
      ValueError: some strategies have labels of their own and others do not.
    """
    labelled = {s.labelled for s in strategies}
    if len(labelled) > 1:
        raise ValueError(
            "some members were trained on graded clicks and have labels of their own, and others not: the same support "
            "targets would mean two things; train all with the same `graded`, or pass all of them trained"
        )

    def init(key: jax.Array) -> Params:
        return [s.init(k) for s, k in zip(strategies, jax.random.split(key, len(strategies)), strict=True)]

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        keys = jax.random.split(key, len(strategies))
        return [s.adapt(p, support, k) for s, p, k in zip(strategies, params, keys, strict=True)]

    def each(functions: Sequence[Any]) -> Callable[[Params, Adapted, Features], jax.Array]:
        return lambda params, adapted, features: jnp.stack(
            [f(p, a, features) for f, p, a in zip(functions, params, adapted, strict=True)]
        )

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = jax.random.split(key, len(strategies))
        results = [s.loss(p, task, k) for s, p, k in zip(strategies, params, keys, strict=True)]
        names = dict.fromkeys(name for _, aux in results for name in aux)
        aux = {name: _pooled(jnp.stack([aux[name] for _, aux in results if name in aux])) for name in names}
        return jnp.stack([value for value, _ in results]), aux

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        split = jax.vmap(lambda key: jax.random.split(key, len(strategies)), out_axes=1)(keys)
        each_member = zip(strategies, params, adapted, split, strict=True)
        return [s.sample(p, a, k, strength) for s, p, a, k in each_member if s.sample]

    scores, deviations = each([s.predict for s in strategies]), each([s.deviation for s in strategies])
    all_have_deviation = all(s.deviation for s in strategies)
    return Members(
        init,
        adapt,
        scores,
        loss,
        deviations if all_have_deviation else None,
        sample if all(s.sample for s in strategies) else None,
        True in labelled,
    )


def _pooled(values: jax.Array) -> jax.Array:
    return values.mean(0) if jnp.issubdtype(values.dtype, jnp.inexact) else values.sum(0)
