"""Training: meta-train a strategy on the training users, keep the parameters that the validation users like best."""

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
SHORT = {"click": 0.0, "rating": 0.8}  # share of short support sets in training
SELECT = {"click": "log_loss", "rating": "rmse", "ranking": "ndcg@100"}  # what validation looks at
HIGHEST = ("ranking",)  # targets of which that is to be high
FOLDS = 4  # of the training users, where a strategy for clicks or ratings learns in closed form and by gradients
VALIDATED = 1024  # validation users of a ranking that are looked at after each epoch


class Fitted(NamedTuple):
    """The outcome of `fit`.

    Attributes:
      params: the best epoch's parameters.
      epoch: that epoch.
      history: one dict an epoch: `loss` (mean over the epoch's batches) and the validation metrics.
    """

    params: Params
    epoch: int
    history: list[dict[str, float]]


@cache
def default_optimizer(learning_rate: float = 3e-3, penalty: float = 2e-3) -> optax.GradientTransformation:
    """Adam on the meta-loss plus `penalty / 2 * |params|^2`.

    The penalty is part of the gradient, not decoupled as in AdamW: rarely rated items must shrink to the prior in
    proportion to how little is known about them, and a decoupled decay shrinks all items alike. Cached, because a new
    value is a new function to `jit`, and every call of `fit` would compile anew.
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
    """Meta-train with early stopping. Support and query sets are drawn anew in each epoch.

    One program is compiled for each bucket of support sizes, none in the loop after that.

    Args:
      strategy: what to train.
      split: training and validation users.
      target: ratings to targets.
      query: query size of a training task.
      optimizer: outer optimiser (default `default_optimizer()`).
      epochs: at most so many passes over the training users (default: 60, to rank 20).
      min_epochs: the first epoch whose parameters may be kept (default: a third of `epochs`, to rank a tenth). With
        long support sets the validation loss is low from the first epochs on, before the shared part has been learned.
      patience: stop after so many epochs without a better validation loss.
      batch_size: users a meta-step.
      chunk: users differentiated at a time; bounds the memory of a large batch and changes nothing else, but for draws
        of noise (anp, tanp) and tanp's grouping of users, which is each chunk's own.
      max_support: longest support set; longer histories are sampled anew in each epoch.
      buckets: number of padded support widths, chosen to waste the least; or the widths themselves.
      average: what is validated and kept is a running average of the parameters that keeps this share of itself at each
        epoch (0: the last parameters; Polyak and Juditsky, 1992; default: 0.9, to rank 0.8).
      unknown: share of users and items whose identity is hidden in training, which trains the unknown rows.
      short: share of users whose support set is cut to a random length in training; where there are any, validation
        means over 3 and all support examples. Default: 0.8 for ratings, where it is much better for new users with few
        of them; strategies with inner gradient steps want a `count` with it, or lose with many. 0 for clicks, where it
        helps only those strategies (0.5).
      noise: share of the support ratings that are replaced by random ones in training, so that adaptation learns how
        far to trust them; queries stay as they are.
      statistics: takes a training user's own interactions out of the item field that it made, when the data has it.
      seed: of the initial parameters and of the sampling.
      params: initial parameters (default: those of `strategy.init`).
      objective: of a ranking (default `Ranking()`), whose own `query`, `unknown` and `short` count; `noise` is for
        clicks and ratings. An epoch has 4,096 training users at most and looks at the nDCG@100 of 1,024 validation
        users among all items, a mean over 1, 3, 5, 10 and all support positives.
      checkpoint: a file that holds the training after each epoch; the same call goes on from it, with the same result
        as one that was never stopped. Of the optimiser only the shapes of its state are compared: give the same.
      told: what else tells this training from others, kept in the checkpoint and compared, as JSON holds it.
      report: called after each epoch with its number and its entry in `history`.

    Raises:
      FloatingPointError: the loss is no longer finite.
      ModelFileError: `checkpoint` is damaged or of another training.
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
    # a copy, because steps write over what they are given
    params = jax.jit(strategy.init)(key) if params is None else jax.tree.map(jnp.array, params)
    start = jax.device_get(params)
    if strategy.fit and not jax.tree.leaves({n: x for n, x in start.items() if n != SHIFTS}):  # fitted in closed form
        return Fitted(source.whole(start), -1, [])
    at = _State(params, jax.jit(optimizer.init)(params), start, Fitted(start, -1, []), np.random.default_rng(seed), key)
    setting = source.setting | {"seed": seed, "average": average, "target": asdict(target)}
    setting |= {"params": [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]}
    setting |= {"users": sha256(split.train.users.tobytes()).hexdigest()} | dict(told or {})
    if checkpoint is not None:
        at = at.restored(checkpoint, setting)
    share = 10 if target.kind == "ranking" else 3
    first = min(epochs // share if min_epochs is None else min_epochs, epochs - 1)
    judged, sign = SELECT[target.kind], -1 if target.kind in HIGHEST else 1
    for epoch in range(len(at.best.history), epochs):
        if epoch - 1 > first and epoch - 1 - at.best.epoch >= patience:
            break
        params, state, averaged, best, rng, key = at
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
        if epoch <= first or sign * entry[judged] < sign * history[best.epoch][judged]:
            best = Fitted(jax.device_get(averaged), epoch, history)
        at = _State(params, state, averaged, best._replace(history=history), rng, key)
        if checkpoint is not None:
            at.save(checkpoint, setting)
    return at.best._replace(params=source.whole(at.best.params))


class _Source(NamedTuple):
    """What a training of one kind of target draws and looks at.

    Attributes:
      batches: `batches(rng)`, one epoch of tasks, each with the tables that its loss reads.
      loss: `loss(params, task, key) -> (scalar, aux)`, where `params` hold the tables.
      validate: `validate(params)`, metrics of the validation users.
      whole: `whole(params)`, the parameters with the tables of all training users.
      setting: what a checkpoint compares.
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
    """Clicks and ratings: tasks of support and query, the loss of the strategy; tables, where it makes any, of the
    other folds of the training users."""
    lengths = np.clip(split.train.lengths - sampling["query"], 1, max_support)
    widths = bucket_sizes(lengths, buckets) if isinstance(buckets, int) else buckets
    observed = everybody = None
    if strategy.fit is not None:
        observed = observe(split.train, target)
        with one_thread():
            everybody = {"fitted": strategy.fit(observed)}

    @cache
    def folds() -> list[tuple[Histories, Params]]:
        """The users of each fold and the tables of the others; one fold where there are no tables."""
        if observed is None or strategy.fit is None:
            return [(split.train, {})]
        users, place = np.unique(split.train.users, return_inverse=True)
        fold_of = np.random.default_rng([seed, 1]).permutation(len(users)) % FOLDS
        with one_thread():
            made = [{"fitted": strategy.fit(observed.of(np.flatnonzero(fold_of != k)))} for k in range(FOLDS)]
        return [(split.train.take(np.flatnonzero(fold_of[place] == k)), jax.device_put(made[k])) for k in range(FOLDS)]

    def epoch(rng: np.random.Generator) -> Iterator[tuple[Any, Params]]:
        for histories, tables in folds():
            for batch in batches(histories, target, buckets=widths, statistics=statistics, rng=rng, **sampling):
                yield batch.task, tables

    def whole(params: Params) -> Params:
        return params if everybody is None else {**params, TABLES: everybody}

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
    """A ranking: supports and queries among all items, tables of the other folds of the training users."""
    widths = widths_of(split.train, max_support, buckets) if isinstance(buckets, int) else buckets
    users, place = np.unique(split.train.users, return_inverse=True)
    fold_of = np.random.default_rng([seed, 1]).permutation(len(users)) % objective.folds
    fold, observed = fold_of[place], observe(split.train, target)

    def without(k: int) -> Params:
        """The tables of the users outside a fold."""
        kept = np.flatnonzero(fold_of != k)
        part = observed.of(kept)
        if statistics is not None:
            histories = split.train.take(np.flatnonzero(fold != k))
            part = part._replace(features=observe(histories, target, ItemStatistics.fit(histories, target)).features)
        return fitted_tables(strategy, part)

    @cache
    def everybody() -> Params:
        return jax.device_put(fitted_tables(strategy, observed))

    @cache
    def folds() -> list[Params]:
        with one_thread(), ThreadPoolExecutor(os.cpu_count()) as threads:
            first = threads.submit(everybody)
            made = [jax.device_put(found) for found in threads.map(without, range(objective.folds))]
            first.result()
        return made

    following = strategy.prefixes is not None and split.train.ordered
    loss = _ranking_loss(strategy, objective, following)
    draw = partial(drawn, batch_size=batch_size, widths=widths, fold=fold, following=following)
    some = split.validation.take(np.arange(min(len(split.validation), VALIDATED)))

    def epoch(rng: np.random.Generator) -> Iterator[tuple[Any, Params]]:
        for task, k in draw(split.train, target, objective, rng=rng):
            yield task, folds()[k]

    def whole(params: Params) -> Params:
        return {**params, TABLES: everybody()}

    def validate(params: Params) -> dict[str, float]:
        found = by_support(lambda size: rank(strategy, whole(params), some, target, query=query, support=size))
        ndcg = [float(np.nanmean(values)) for name, values in found.items() if name.startswith("ndcg@100")]
        return {"ndcg@100": float(np.mean(ndcg))}

    setting = {"objective": asdict(objective), "batch_size": batch_size, "widths": [*map(int, widths)]}
    return _Source(epoch, loss, validate, whole, setting)


@lru_cache(maxsize=64)
def _ranking_loss(strategy: Strategy, objective: Ranking, following: bool) -> Callable[..., Any]:
    """The same function for the same arguments, so that `jit` knows it again."""
    return ranking_loss(strategy, objective, following)


class _State(NamedTuple):
    """A training between two epochs: all that the next one depends on."""

    params: Params
    state: Any  # of the optimiser
    averaged: Params
    best: Fitted
    rng: np.random.Generator
    key: jax.Array

    def save(self, path: str | Path, setting: dict[str, Any]) -> None:
        past = {"history": self.best.history, "best": self.best.epoch, "rng": self.rng.bit_generator.state}
        write(path, self._arrays(), past | {"key": jax.random.key_data(self.key).tolist()}, setting)

    def restored(self, path: str | Path, setting: dict[str, Any]) -> "_State":
        """What `save` kept; this one, a training's start, where the file is not there yet."""
        found = read(path, self._arrays(), setting)
        if not found:
            return self
        arrays, past = found
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
    """`meta_step`, compiled once for each loss, optimiser and shape, also over several calls of `fit`.

    The loss finds the tables among the parameters; no gradient and no optimiser reaches them.
    """

    def of_tables(params: Params, task: Task, key: jax.Array) -> Any:
        return loss({**params, TABLES: tables} if tables else params, task, key)

    return meta_step(of_tables, optimizer, chunk=chunk)(params, state, task, key)


@jax.jit
def _average(averaged: Params, params: Params, keep: float) -> Params:
    return optax.incremental_update(params, averaged, 1 - keep)
