"""Ranked: train any strategy to rank the catalogue, by a softmax over all items or a sample shared by the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.core.columns import set_columns
from metarec_jax.data.schema import ITEM_ID
from metarec_jax.strategies.catalogue import adapt, features, last, score, score_shared, support_of
from metarec_jax.strategies.observed import popularity
from metarec_jax.strategies.smooth import at, counts, positives, smooth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.ranking import Known, RankingTask
from metarec_jax.types import Examples, Features, Params, Task

TABLES = "tables"  # key of the catalogue's tables among the parameters; they get no gradient
OWN = "ranking"  # key of the parameters of `ranked`

FOCUSED = 50  # number of support positives at which the exponent of the weights is half of `focus`
FULL = 20_000  # largest catalogue for a softmax over all items
SAMPLE = 2_048  # items in the sampled softmax
CELLS = 1 << 27  # largest number of scores in a batch for a softmax over all items


def ranked(strategy: Strategy, *, negatives: int = 32, ratio: float = 1.0) -> Strategy:
    """Wrap `strategy` so that its scores rank the catalogue: log popularity plus the strategy's score of a user.

        score(x) = f_u(x) + c(n) log p(x)

    If the strategy fits the support (`Strategy.contrast`), sampled negatives are added to the positives, so that the
    support loss has both classes. c is a learned smooth function of the number n of positives that starts at 1, so that
    a user without a history initially gets popularity.

    Args:
      strategy: one whose parameters are a dict.
      negatives: number of negatives, drawn uniformly once for the whole batch.
      ratio: weight of all negatives over that of all positives.

    Raises:
      TypeError: from `init`, if the parameters are not a dict.

    Example:
      Without a history the score is the log popularity of the items, here of the rows 1 and 2 of the catalogue:

      >>> model = mr.Model(init=lambda key: jnp.zeros(3), apply=lambda w, x: w[x["item_id"]])
      >>> strategy = mr.ranked(mr.maml(model), negatives=2)
      >>> items, log_popularity = {"item_id": jnp.arange(3)}, jnp.array([-2.0, -1.0, -0.5])
      >>> params = strategy.init(jax.random.key(0)) | {"tables": {"items": items, "log_popularity": log_popularity}}
      >>> query = {"item_id": jnp.array([[1, 2]])}
      >>> nothing = mr.Examples(query, jnp.zeros((1, 2)), jnp.zeros((1, 2)))
      >>> jax.jit(strategy.predict)(params, jax.jit(strategy.adapt)(params, nothing, jax.random.key(1)), query)
      Array([[-1. , -0.5]], dtype=float32)
    """
    if strategy.ranks:
        return strategy
    count = negatives if strategy.contrast else 0

    def init(key: jax.Array) -> Params:
        params = strategy.init(key)
        if not isinstance(params, dict) or {OWN, TABLES} & params.keys():
            raise TypeError(f"the parameters must be a dict without {OWN!r} and {TABLES!r}")
        return {**params, OWN: {"popularity": smooth()}}

    def of_strategy(params: Params) -> Params:
        return {name: value for name, value in params.items() if name not in (OWN, TABLES)}

    def extended(params: Params, support: Examples, key: jax.Array) -> Examples:
        return support if not count else with_negatives(support, params[TABLES]["items"], key, count, ratio)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        draw, rest = jax.random.split(key)
        weight = 1.0 + at(params[OWN]["popularity"], positives(support))
        return strategy.adapt(of_strategy(params), extended(params, support, draw), rest), weight

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        inner, weight = adapted
        return strategy.predict(of_strategy(params), inner, features) + weight[:, None] * popularity(params, features)

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the strategy's own loss, with negatives added to the positives of support and query."""
        support_key, query_key, rest = jax.random.split(key, 3)
        items = params[TABLES]["items"]
        support = with_negatives(task.support, items, support_key, negatives, ratio)
        query = with_negatives(task.query, items, query_key, negatives, ratio)
        return strategy.loss(of_strategy(params), Task(support, query), rest)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        return strategy.deviation(of_strategy(params), adapted[0], features)

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        assert strategy.sample is not None
        return strategy.sample(of_strategy(params), adapted[0], keys, strength), adapted[1]

    def prefixes(params: Params, support: Examples, key: jax.Array | None) -> Adapted:
        assert strategy.prefixes is not None
        before = jnp.pad(jnp.cumsum(counts(support), 1), ((0, 0), (1, 0)))
        weight = 1.0 + at(params[OWN]["popularity"], before)
        return strategy.prefixes(of_strategy(params), support, key), weight

    def of_items(params: Params, features: Features) -> Any:
        assert strategy.items is not None
        return strategy.items(of_strategy(params), features), popularity(params, features)

    def score(params: Params, adapted: Adapted, side: Any) -> jax.Array:
        assert strategy.score is not None
        inner, weight = adapted
        return strategy.score(of_strategy(params), inner, side[0]) + weight[:, None] * side[1]

    return strategy._replace(
        init=init,
        adapt=adapt,
        predict=predict,
        loss=loss,
        deviation=deviation if strategy.deviation else None,
        items=of_items if strategy.items else None,
        score=score if strategy.score else None,
        prefixes=prefixes if strategy.prefixes else None,
        sample=sample if strategy.sample else None,
        ranks=True,
    )


def with_negatives(
    examples: Examples, items: dict[str, jax.Array], key: jax.Array, count: int, ratio: float
) -> Examples:
    """Append `count` uniformly drawn items with target 0; items that the user has are masked.

    Args:
      examples: `[users, n, ...]`, whose "item_id" are rows of `items`.
      items: features of the catalogue, each `[rows, ...]`; row 0 is the unknown item.
      key: of the draw.
      count: number of items, drawn for all users together.
      ratio: weight of a user's negatives over that of the positives.
    """
    users = len(examples.mask)
    rows = jax.random.randint(key, (count,), 1, len(items[ITEM_ID]))
    has = (examples.features[ITEM_ID][:, :, None] == rows) & (examples.mask > 0)[:, :, None]
    weight = ratio * positives(examples)[:, None] / count * ~has.any(1)
    extended = {}
    for name, value in examples.features.items():
        if name in items:
            new = jnp.broadcast_to(items[name][rows], (users, count, *items[name].shape[1:]))
        else:  # a feature of the user, or the position in time
            new = jnp.broadcast_to(value[:, :1], (users, count, *value.shape[2:]))
        extended[name] = jnp.concatenate([value, new.astype(value.dtype)], 1)
    target = jnp.concatenate([examples.target, jnp.zeros((users, count), examples.target.dtype)], 1)
    return Examples(extended, target, jnp.concatenate([examples.mask, weight.astype(examples.mask.dtype)], 1))


def ranking_loss(
    strategy: Strategy, objective: Ranking, following: bool = False
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return `loss(params, task, key)` of a strategy that ranks, for a `RankingTask`; see `Ranking`.

    Args:
      strategy, objective: what is trained, and the settings of its loss.
      following: whether the query of a task holds the next item at each position; for strategies with `prefixes`.
    """

    def loss(params: Params, task: RankingTask, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hide, draw, rest = jax.random.split(key, 3)
        items = dict(params[TABLES]["items"])
        rows = len(items[ITEM_ID])
        hidden = jax.random.bernoulli(hide, objective.unknown, (rows,))  # the same items for all users
        items[ITEM_ID] = jnp.where(hidden, 0, items[ITEM_ID])
        known = task.known
        if strategy.outer == "own":
            return strategy.loss(params, _pointwise(items, task), rest)
        if strategy.outer == "shared":
            known = known._replace(weight=jnp.zeros_like(known.weight))
        if following:
            assert strategy.prefixes is not None
            states = strategy.prefixes(params, support_of(items, known), rest)
            adapted, task = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states), _each_place(task)
            known = task.known
        else:
            adapted = adapt(strategy, params, items, known, rest)
        mask = task.query.mask * ~_contains(task.known, task.query.rows)
        discount = strategy.novelty * popularity(params, items)  # not part of the loss
        fits = rows <= FULL and rows * len(mask) <= CELLS
        sample = objective.sample if objective.sample is not None else (None if fits else SAMPLE)
        if sample is None or sample >= rows:
            scores = score_shared(strategy, params, adapted, known, items) + discount
            seen = jnp.where(task.known.weight > 0, task.known.items, 0)  # row 0 is the unknown item
            scores = set_columns(scores.at[:, 0].set(-jnp.inf), seen, -jnp.inf)
            chosen = jnp.take_along_axis(scores, task.query.rows, 1)
            total = jax.nn.logsumexp(scores, axis=1)
        else:
            drawn, log_chance = _drawn(objective.by, sample, params[TABLES]["log_popularity"], task, draw)
            others = score_shared(strategy, params, adapted, known, {name: x[drawn] for name, x in items.items()})
            taken = _contains(task.known, drawn) | _is_query(task, drawn)
            others = jnp.where(taken, -jnp.inf, others + discount[drawn] - log_chance - jnp.log(len(drawn)))
            chosen = score(strategy, params, items, adapted, known, task.query.rows) + discount[task.query.rows]
            others_and_query = jnp.concatenate([others, jnp.where(mask > 0, chosen, -jnp.inf)], 1)
            total = jax.nn.logsumexp(others_and_query, axis=1)
        log_chosen = jnp.where(mask > 0, chosen - total[:, None], 0.0)
        count = positives(support_of(items, task.known))[:, None]
        focus = objective.focus * count / (count + FOCUSED)
        weight = mask * jax.lax.stop_gradient(jnp.exp(focus * log_chosen))
        per_user = -(weight * log_chosen).sum(1) / jnp.maximum(weight.sum(1), 1e-20)
        real = (mask > 0).any(1)
        return jnp.where(real, per_user, 0.0).sum() / jnp.maximum(real.sum(), 1), {}

    return loss


def _each_place(task: RankingTask) -> RankingTask:
    """Return a task with one user per position of each history.

    The next item is the user's one positive, and no item counts as seen.
    """
    users, places = task.query.rows.shape
    nothing = jnp.zeros((users * places, 1))
    user, context = (jax.tree.map(lambda x: jnp.repeat(x, places, 0), x) for x in (task.known.user, task.known.context))
    query = jax.tree.map(lambda x: x.reshape(-1, 1), task.query)
    return RankingTask(Known(nothing.astype(jnp.int32), nothing, nothing, user, context), query)


def _pointwise(items: dict[str, jax.Array], task: RankingTask) -> Task:
    """Return support and query as examples; every query item is a positive."""
    known, query = task.known, {name: x[task.query.rows] for name, x in items.items()}
    return Task(
        support_of(items, known),
        Examples(
            features(query, known.user, known.context, last(known)[:, None]),
            jnp.ones_like(task.query.mask),
            task.query.mask,
        ),
    )


def _contains(known: Known, rows: jax.Array) -> jax.Array:
    """Whether each of `rows`, `[users, n]` or `[n]` for all users, is in a user's support, `[users, n]`."""
    return _among(jnp.where(known.weight > 0, known.items, -1), rows)


def _is_query(task: RankingTask, rows: jax.Array) -> jax.Array:
    """Whether each of `rows` is a query item of a user, `[users, n]`."""
    return _among(jnp.where(task.query.mask > 0, task.query.rows, -1), rows)


def _among(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Whether each of `rows` is in `values` `[users, m]`, as `[users, n]`; by binary search in the sorted values."""
    if values.shape[1] == 1:
        return values == rows
    sorted_values = jnp.sort(values, 1)

    def search(values: jax.Array, rows: jax.Array) -> jax.Array:
        position = jnp.minimum(jnp.searchsorted(values, rows), values.shape[0] - 1)
        return values[position] == rows

    return jax.vmap(search, (0, 0 if rows.ndim == 2 else None))(sorted_values, rows)


def _drawn(
    by: str, sample: int, log_popularity: jax.Array, task: RankingTask, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw item rows `[sample]`; also return the log probability of each."""
    rows = len(log_popularity)
    if by == "uniform":
        drawn = jax.random.randint(key, (sample,), 1, rows)
        return drawn, jnp.full(sample, -jnp.log(rows - 1.0))
    log_share = log_popularity.at[0].set(-jnp.inf)
    log_share -= jax.nn.logsumexp(log_share)
    if by == "popularity":
        cumulative = jnp.cumsum(jnp.exp(log_share))
        drawn = jnp.searchsorted(cumulative, jax.random.uniform(key, (sample,)) * cumulative[-1]).astype(jnp.int32)
    else:
        flat, weight = task.query.rows.ravel(), task.query.mask.ravel()
        position = jax.random.choice(key, flat.shape[0], (sample,), p=weight / jnp.maximum(weight.sum(), 1e-20))
        drawn = flat[position]
    drawn = jnp.clip(drawn, 1, rows - 1)
    return drawn, log_share[drawn]
