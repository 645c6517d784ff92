"""Sources: the training tasks, the loss and the validation of each kind of target."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from metarec_jax.collaborative.factorise import one_thread
from metarec_jax.core import Layout
from metarec_jax.metrics.ranking import by_support, rank
from metarec_jax.metrics.scoring import score_tasks, summarise
from metarec_jax.strategies.observed import tables as fitted_tables
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.wrappers.ranked import TABLES, ranking_loss
from metarec_jax.tasks.batching import batches, bucket_sizes
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.observed import item_features, observe
from metarec_jax.tasks.ranking_draws import NO_FOLD, drawn, widths_of
from metarec_jax.tasks.splits import Histories, Split
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target
from metarec_jax.types import Params

FOLDS = 4  # folds of training users for click and rating strategies with tables fitted in closed form
VALIDATED = 1024  # most validation users evaluated after each epoch of a ranking,
SCORED = 1 << 28  # and most scores of them
MANY, HELD_OUT = 1 << 17, 1 << 14  # of more training users, meta-train on as many that the tables are not fitted to


class Source(NamedTuple):
    """Sampling, loss and validation of one kind of target.

    Attributes:
      batches: `batches(rng)`, the tasks of one epoch, each with the tables that its loss reads.
      loss: `loss(params, task, key) -> (scalar, aux)`, where `params` include the tables.
      validate: `validate(params)`, metrics of the validation users.
      whole: `whole(params)`, the parameters with the tables of all training users.
      setting: settings compared when a checkpoint is resumed.
    """

    batches: Callable[[np.random.Generator], Iterator[tuple[Any, Params]]]
    loss: Callable[..., Any]
    validate: Callable[[Params], dict[str, float]]
    whole: Callable[[Params], Params]
    setting: dict[str, Any]


def pointwise(
    strategy: Strategy,
    split: Split,
    target: Target,
    sampling: dict[str, Any],
    max_support: int,
    buckets: int | tuple[int, ...],
    statistics: ItemStatistics | None,
    seed: int,
    layout: Layout,
) -> Source:
    """Build the source of clicks and ratings: support and query tasks with the strategy's loss.

    If the strategy fits tables in closed form, each fold of training users gets those fitted on the other folds.
    """
    lengths = np.clip(split.train.lengths - sampling["query"], 1, max_support)
    widths = bucket_sizes(lengths, buckets) if isinstance(buckets, int) else buckets
    observed = full_tables = None
    if strategy.fit is not None:
        observed = observe(split.train, target)
        with one_thread():
            full_tables = layout.place({"fitted": strategy.fit(observed)})

    @cache
    def folds() -> list[tuple[Histories, Params]]:
        """Return the users of each fold with the tables of the other folds; one fold without tables."""
        if observed is None or strategy.fit is None:
            return [(split.train, {})]
        users, user_rows = np.unique(split.train.users, return_inverse=True)
        fold_of = np.random.default_rng([seed, 1]).permutation(len(users)) % FOLDS
        with one_thread():
            fold_tables = [{"fitted": strategy.fit(observed.of(np.flatnonzero(fold_of != k)))} for k in range(FOLDS)]
        return [
            (split.train.take(np.flatnonzero(fold_of[user_rows] == k)), layout.place(fold_tables[k]))
            for k in range(FOLDS)
        ]

    def epoch(rng: np.random.Generator) -> Iterator[tuple[Any, Params]]:
        for histories, tables in folds():
            for batch in batches(histories, target, buckets=widths, statistics=statistics, rng=rng, **sampling):
                yield layout.batch(batch.task), tables

    def whole(params: Params) -> Params:
        return params if full_tables is None else {**params, TABLES: full_tables}

    def validate(params: Params) -> dict[str, float]:
        shape = {"query": sampling["query"], "batch_size": sampling["batch_size"], "buckets": widths[-1:]}
        tables = []
        for size in (3, None) if sampling["short"] else (None,):
            tasks = batches(split.validation, target, support=size, **shape)
            tables.append(summarise(score_tasks(strategy, whole(params), tasks, target, layout), target.kind))
        return {name: float(np.mean([table[name] for table in tables])) for name in tables[0]}

    return Source(epoch, strategy.loss, validate, whole, sampling | {"widths": [*map(int, widths)]})


def ranking(
    strategy: Strategy,
    split: Split,
    target: Target,
    objective: Ranking,
    query: int,
    batch_size: int,
    max_support: int,
    buckets: int | tuple[int, ...],
    statistics: ItemStatistics | None,
    seed: int,
    layout: Layout,
) -> Source:
    """Build the source of a ranking: tasks over all items, with tables fitted on the other folds of users."""
    widths = widths_of(split.train, max_support, buckets) if isinstance(buckets, int) else buckets
    users, user_rows = np.unique(split.train.users, return_inverse=True)
    fold_of, count = _folds(len(users), objective.folds, seed)
    fold, observed = fold_of[user_rows], observe(split.train, target)

    def tables_without(k: int) -> Params:
        """Fit the tables on the users outside fold `k`."""
        kept = np.flatnonzero(fold_of != k)
        part = observed.of(kept)
        if statistics is not None:
            others = ItemStatistics.fit(split.train.take(np.flatnonzero(fold != k)), target)
            part = part._replace(features=item_features(split.train.data, others))
        return fitted_tables(strategy, part)

    @cache
    def full_tables() -> Params:
        return layout.place(fitted_tables(strategy, observed))

    @cache
    def folds() -> list[Params]:
        with one_thread(), ThreadPoolExecutor(os.cpu_count()) as threads:
            full = threads.submit(full_tables)
            fold_tables = [layout.place(tables) for tables in threads.map(tables_without, range(count))]
            full.result()
        return fold_tables

    following = strategy.prefixes is not None and split.train.ordered
    loss = _ranking_loss(strategy, objective, following)
    draw = partial(drawn, batch_size=batch_size, widths=widths, fold=fold, following=following)
    validated = min(len(split.validation), VALIDATED, max(SCORED // observed.items, 1))
    validation = split.validation.take(np.arange(validated)), target

    def epoch(rng: np.random.Generator) -> Iterator[tuple[Any, Params]]:
        for task, k in draw(split.train, target, objective, rng=rng):
            yield layout.batch(task), folds()[k]

    def whole(params: Params) -> Params:
        return {**params, TABLES: full_tables()}

    def validate(params: Params) -> dict[str, float]:
        metrics = by_support(
            lambda size: rank(strategy, whole(params), *validation, query=query, support=size, layout=layout)
        )
        return {"ndcg@100": float(np.mean([np.nanmean(x) for name, x in metrics.items() if "ndcg@100" in name]))}

    setting = {"objective": asdict(objective), "batch_size": batch_size, "widths": [*map(int, widths)]}
    return Source(epoch, loss, validate, whole, setting)


def _folds(users: int, folds: int, seed: int) -> tuple[np.ndarray, int]:
    """Return the fold of each user and the number of folds: one of `HELD_OUT` users if there are more than `MANY`."""
    shuffled = np.random.default_rng([seed, 1]).permutation(users)
    return (shuffled % folds, folds) if users <= MANY else (np.where(shuffled < HELD_OUT, 0, NO_FOLD), 1)


@lru_cache(maxsize=64)
def _ranking_loss(strategy: Strategy, objective: Ranking, following: bool) -> Callable[..., Any]:
    """Return the same function for the same arguments, so that `jit` does not recompile."""
    return ranking_loss(strategy, objective, following)
