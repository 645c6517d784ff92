"""Training loop: meta-train on the training users and keep the parameters with the best validation metric."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.collaborative.factorise import one_thread
from metarec_jax.core import meta_step
from metarec_jax.metrics.ranking import by_support, rank
from metarec_jax.metrics.scoring import score_tasks, summarise
from metarec_jax.strategies.observed import tables as fitted_tables
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.wrappers.labels import SHIFTS
from metarec_jax.strategies.wrappers.ranked import TABLES, ranking_loss
from metarec_jax.tasks.batching import batches, bucket_sizes
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.observed import observe
from metarec_jax.tasks.ranking_draws import drawn, widths_of
from metarec_jax.tasks.splits import Histories, Split
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target
from metarec_jax.training.checkpoint import read, write
from metarec_jax.types import Params, Task

EPOCHS = {"click": 60, "rating": 60, "ranking": 20}
AVERAGE = {"click": 0.9, "rating": 0.9, "ranking": 0.8}
SHORT = {"click": 0.0, "rating": 0.8}  # share of truncated support sets in training
SELECT = {"click": "log_loss", "rating": "rmse", "ranking": "ndcg@100"}  # validation metric
HIGHEST = ("ranking",)  # targets whose metric is maximised
FOLDS = 4  # folds of training users for click and rating strategies with tables fitted in closed form
VALIDATED = 1024  # validation users evaluated after each epoch of a ranking


class Fitted(NamedTuple):
    """The result of `fit`.

    Attributes:
      params: parameters of the best epoch.
      epoch: the best epoch; -1 if all parameters are fitted in closed form.
      history: one dict per epoch: `loss` (mean over the epoch's batches) and the validation metrics.
    """

    params: Params
    epoch: int
    history: list[dict[str, float]]


@cache
def default_optimizer(learning_rate: float = 3e-3, penalty: float = 2e-3) -> optax.GradientTransformation:
    """Build Adam on the meta-loss plus `penalty / 2 * |params|^2`.

    The penalty is part of the gradient, not decoupled as in AdamW. Rarely rated items must shrink to the prior in
    proportion to how little is known about them; decoupled decay shrinks all items alike. Cached, because `jit`
    recompiles for every new optimiser value.
    """
    return optax.chain(optax.add_decayed_weights(penalty), optax.adam(learning_rate))


def fit(
    strategy: Strategy,
    split: Split,
    target: Target,
    *,
    query: int = 10,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int | None = None,
    min_epochs: int | None = None,
    patience: int = 8,
    batch_size: int = 32,
    chunk: int | None = None,
    max_support: int = 128,
    buckets: int | tuple[int, ...] = 2,
    average: float | None = None,
    unknown: float = 0.1,
    short: float | None = None,
    noise: float = 0.0,
    statistics: ItemStatistics | None = None,
    seed: int = 0,
    params: Params | None = None,
    objective: Ranking | None = None,
    checkpoint: str | Path | None = None,
    told: Mapping[str, Any] | None = None,
    report: Callable[[int, dict[str, float]], Any] | None = None,
) -> Fitted:
    """Meta-train with early stopping; support and query sets are resampled in each epoch.

    One program is compiled for each support width.

    Args:
      strategy: strategy to train.
      split: training and validation users.
      target: maps ratings to targets.
      query: query size of a training task.
      optimizer: outer optimiser (default: `default_optimizer()`).
      epochs: maximum number of passes over the training users (default: 60; 20 for rankings).
      min_epochs: first epoch whose parameters may be kept (default: a third of `epochs`; a tenth for rankings). With
        long support sets the validation loss is low from the first epochs on, before the shared parameters have been
        learned.
      patience: stop after this many epochs without a better validation metric.
      batch_size: users per meta-step.
      chunk: users differentiated at a time, which bounds the memory of a large batch. The result is the same, except
        for noise draws (anp, tanp) and tanp's grouping of users, which are per chunk.
      max_support: largest support set; longer histories are resampled in each epoch.
      buckets: number of padded support widths, chosen to minimise padding; or the widths themselves.
      average: decay per epoch of the running average of the parameters, which is validated and returned (0: the last
        parameters; default: 0.9; 0.8 for rankings; Polyak and Juditsky, 1992).
      unknown: share of users and items whose identity is hidden in training, which trains the unknown rows.
      short: share of users whose support set is cut to a random length in training. If positive, validation averages
        over 3 and all support examples. Default: 0.8 for ratings, where it is much better for new users with few
        ratings; strategies with inner gradient steps also need a `count`, or they lose accuracy with many ratings. 0
        for clicks, where it helps only those strategies (0.5).
      noise: share of support ratings replaced by random ones in training, so that adaptation learns how far to trust
        them. Queries are unchanged.
      statistics: removes a training user's own interactions from the item statistics field, if the data have it.
      seed: seed of the initial parameters and of the sampling.
      params: initial parameters (default: `strategy.init`).
      objective: settings of a ranking (default: `Ranking()`). Its `query`, `unknown` and `short` replace those above,
        and `noise` is not used. An epoch has at most 4,096 training users. Validation is the nDCG@100 among all items
        of 1,024 validation users, averaged over 1, 3, 5, 10 and all support positives.
      checkpoint: file that holds the training after each epoch. The same call resumes from it, with the result of an
        uninterrupted run. Pass the same optimiser: only the shapes of its state are compared.
      told: extra run metadata, stored in the checkpoint as JSON and compared on resume.
      report: called after each epoch with its number and its entry of `history`.

    Raises:
      FloatingPointError: the loss is not finite.
      ModelFileError: `checkpoint` is damaged or belongs to another training.
    """
    kind = target.kind
    optimizer = default_optimizer() if optimizer is None else optimizer
    epochs = EPOCHS[kind] if epochs is None else epochs
    average = AVERAGE[kind] if average is None else average
    key = jax.random.key(seed)
    if target.kind == "ranking":
        objective = Ranking() if objective is None else objective
        source = _ranking(strategy, split, target, objective, query, batch_size, max_support, buckets, statistics, seed)
    else:
        short = SHORT[target.kind] if short is None else short
        sampling = {"query": query, "batch_size": batch_size, "unknown": unknown, "short": short, "noise": noise}
        source = _pointwise(strategy, split, target, sampling, max_support, buckets, statistics, seed)
    # copied, because `_step` donates its arguments
    params = jax.jit(strategy.init)(key) if params is None else jax.tree.map(jnp.array, params)
    start = jax.device_get(params)
    if strategy.fit and not jax.tree.leaves({n: x for n, x in start.items() if n != SHIFTS}):  # all closed form
        return Fitted(source.whole(start), -1, [])
    current = _State(
        params, jax.jit(optimizer.init)(params), start, Fitted(start, -1, []), np.random.default_rng(seed), key
    )
    setting = source.setting | {"seed": seed, "average": average, "target": asdict(target)}
    setting |= {"params": [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]}
    setting |= {"users": sha256(split.train.users.tobytes()).hexdigest()} | dict(told or {})
    if checkpoint is not None:
        current = current.restored(checkpoint, setting)
    share = 10 if target.kind == "ranking" else 3
    first = min(epochs // share if min_epochs is None else min_epochs, epochs - 1)
    metric, sign = SELECT[target.kind], -1 if target.kind in HIGHEST else 1
    for epoch in range(len(current.best.history), epochs):
        if epoch - 1 > first and epoch - 1 - current.best.epoch >= patience:
            break
        params, state, averaged, best, rng, key = current
        losses = []
        for task, shared in source.batches(rng):
            key, step_key = jax.random.split(key)
            params, state, aux = _step(
                params, state, shared, task, step_key, loss=source.loss, optimizer=optimizer, chunk=chunk
            )
            losses.append(aux["loss"])
        loss = float(np.mean(jax.device_get(losses)))
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the meta-loss became {loss} in epoch {epoch}; lower the outer learning rate or the inner step "
                "size; inner Adam needs optax.adam(..., eps_root=1e-8)"
            )
        averaged = _average(averaged, params, average * (epoch > 0))
        entry = {"loss": loss} | source.validate(averaged)
        if report is not None:
            report(epoch, entry)
        history = [*best.history, entry]
        if epoch <= first or sign * entry[metric] < sign * history[best.epoch][metric]:
            best = Fitted(jax.device_get(averaged), epoch, history)
        current = _State(params, state, averaged, best._replace(history=history), rng, key)
        if checkpoint is not None:
            current.save(checkpoint, setting)
    return current.best._replace(params=source.whole(current.best.params))


class _Source(NamedTuple):
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


def _pointwise(
    strategy: Strategy,
    split: Split,
    target: Target,
    sampling: dict[str, Any],
    max_support: int,
    buckets: int | tuple[int, ...],
    statistics: ItemStatistics | None,
    seed: int,
) -> _Source:
    """Build the source of clicks and ratings: support and query tasks with the strategy's loss.

    If the strategy fits tables in closed form, each fold of training users gets those fitted on the other folds.
    """
    lengths = np.clip(split.train.lengths - sampling["query"], 1, max_support)
    widths = bucket_sizes(lengths, buckets) if isinstance(buckets, int) else buckets
    observed = full_tables = None
    if strategy.fit is not None:
        observed = observe(split.train, target)
        with one_thread():
            full_tables = {"fitted": strategy.fit(observed)}

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
            (split.train.take(np.flatnonzero(fold_of[user_rows] == k)), jax.device_put(fold_tables[k]))
            for k in range(FOLDS)
        ]

    def epoch(rng: np.random.Generator) -> Iterator[tuple[Any, Params]]:
        for histories, tables in folds():
            for batch in batches(histories, target, buckets=widths, statistics=statistics, rng=rng, **sampling):
                yield batch.task, tables

    def whole(params: Params) -> Params:
        return params if full_tables is None else {**params, TABLES: full_tables}

    def validate(params: Params) -> dict[str, float]:
        shape = {"query": sampling["query"], "batch_size": sampling["batch_size"], "buckets": widths[-1:]}
        tables = []
        for size in (3, None) if sampling["short"] else (None,):
            tasks = batches(split.validation, target, support=size, **shape)
            tables.append(summarise(score_tasks(strategy, whole(params), tasks, target), target.kind))
        return {name: float(np.mean([table[name] for table in tables])) for name in tables[0]}

    return _Source(epoch, strategy.loss, validate, whole, sampling | {"widths": [*map(int, widths)]})


def _ranking(
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
) -> _Source:
    """Build the source of a ranking: tasks over all items, with tables fitted on the other folds of users."""
    widths = widths_of(split.train, max_support, buckets) if isinstance(buckets, int) else buckets
    users, user_rows = np.unique(split.train.users, return_inverse=True)
    fold_of = np.random.default_rng([seed, 1]).permutation(len(users)) % objective.folds
    fold, observed = fold_of[user_rows], observe(split.train, target)

    def tables_without(k: int) -> Params:
        """Fit the tables on the users outside fold `k`."""
        kept = np.flatnonzero(fold_of != k)
        part = observed.of(kept)
        if statistics is not None:
            histories = split.train.take(np.flatnonzero(fold != k))
            part = part._replace(features=observe(histories, target, ItemStatistics.fit(histories, target)).features)
        return fitted_tables(strategy, part)

    @cache
    def full_tables() -> Params:
        return jax.device_put(fitted_tables(strategy, observed))

    @cache
    def folds() -> list[Params]:
        with one_thread(), ThreadPoolExecutor(os.cpu_count()) as threads:
            full = threads.submit(full_tables)
            fold_tables = [jax.device_put(tables) for tables in threads.map(tables_without, range(objective.folds))]
            full.result()
        return fold_tables

    following = strategy.prefixes is not None and split.train.ordered
    loss = _ranking_loss(strategy, objective, following)
    draw = partial(drawn, batch_size=batch_size, widths=widths, fold=fold, following=following)
    validation_users = split.validation.take(np.arange(min(len(split.validation), VALIDATED)))

    def epoch(rng: np.random.Generator) -> Iterator[tuple[Any, Params]]:
        for task, k in draw(split.train, target, objective, rng=rng):
            yield task, folds()[k]

    def whole(params: Params) -> Params:
        return {**params, TABLES: full_tables()}

    def validate(params: Params) -> dict[str, float]:
        metrics = by_support(
            lambda size: rank(strategy, whole(params), validation_users, target, query=query, support=size)
        )
        ndcg = [float(np.nanmean(values)) for name, values in metrics.items() if name.startswith("ndcg@100")]
        return {"ndcg@100": float(np.mean(ndcg))}

    setting = {"objective": asdict(objective), "batch_size": batch_size, "widths": [*map(int, widths)]}
    return _Source(epoch, loss, validate, whole, setting)


@lru_cache(maxsize=64)
def _ranking_loss(strategy: Strategy, objective: Ranking, following: bool) -> Callable[..., Any]:
    """Return the same function for the same arguments, so that `jit` does not recompile."""
    return ranking_loss(strategy, objective, following)


class _State(NamedTuple):
    """Training state between two epochs: everything that the next epoch depends on."""

    params: Params
    state: Any  # optimiser state
    averaged: Params
    best: Fitted
    rng: np.random.Generator
    key: jax.Array

    def save(self, path: str | Path, setting: dict[str, Any]) -> None:
        past = {"history": self.best.history, "best": self.best.epoch, "rng": self.rng.bit_generator.state}
        write(path, self._arrays(), past | {"key": jax.random.key_data(self.key).tolist()}, setting)

    def restored(self, path: str | Path, setting: dict[str, Any]) -> "_State":
        """Return the state that `save` wrote, or this initial state if there is no file yet."""
        saved = read(path, self._arrays(), setting)
        if not saved:
            return self
        arrays, past = saved
        params, state = jax.tree.map(jnp.array, (arrays["params"], arrays["state"]))
        best = Fitted(arrays["best"], past["best"], past["history"])
        self.rng.bit_generator.state = past["rng"]
        key = jax.random.wrap_key_data(jnp.array(past["key"], jnp.uint32))
        return _State(params, state, arrays["averaged"], best, self.rng, key)

    def _arrays(self) -> dict[str, Any]:
        return {"params": self.params, "state": self.state, "averaged": self.averaged, "best": self.best.params}


@partial(jax.jit, static_argnames=("loss", "optimizer", "chunk"), donate_argnames=("params", "state"))
def _step(
    params: Params,
    state: Any,
    tables: Params,
    task: Task,
    key: jax.Array,
    *,
    loss: Any,
    optimizer: Any,
    chunk: int | None,
) -> Any:
    """Run `meta_step`, compiled once per loss, optimiser and shape, across calls of `fit`.

    The tables are merged into the parameters of the loss only, so neither gradients nor the optimiser reach them.
    """

    def loss_with_tables(params: Params, task: Task, key: jax.Array) -> Any:
        return loss({**params, TABLES: tables} if tables else params, task, key)

    return meta_step(loss_with_tables, optimizer, chunk=chunk)(params, state, task, key)


@jax.jit
def _average(averaged: Params, params: Params, keep: float) -> Params:
    return optax.incremental_update(params, averaged, 1 - keep)
