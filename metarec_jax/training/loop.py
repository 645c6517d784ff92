"""Training loop: meta-train on the training users and keep the parameters with the best validation metric."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from metarec_jax.core import Layout, meta_step
from metarec_jax.data.fingerprint import fingerprint
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.wrappers.labels import SHIFTS
from metarec_jax.strategies.wrappers.ranked import TABLES
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.splits import Split
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target
from metarec_jax.training.checkpoint import read, write
from metarec_jax.training.sources import Source, pointwise, ranking
from metarec_jax.types import Params, Task

EPOCHS = {"click": 60, "rating": 60, "ranking": 20}
AVERAGE = {"click": 0.9, "rating": 0.9, "ranking": 0.8}
SHORT = {"click": 0.0, "rating": 0.8}  # share of truncated support sets in training
SELECT = {"click": "log_loss", "rating": "rmse", "ranking": "ndcg@100"}  # validation metric
WARMUP = {"click": 3, "rating": 3, "ranking": 10}  # the first epoch that may be kept is epochs // WARMUP
HIGHEST = ("ranking",)  # targets whose metric is maximised


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
    mesh: Mesh | None = None,
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
    validate: bool = True,
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
      mesh: devices to train on, with an axis "users" over which each batch is sharded, `jax.make_mesh((8,),
        ("users",))`; see `metarec_jax.core.Layout`. Default: one device. Parameters are replicated. The result is that
        of one device, to rounding, if `batch_size` is a multiple of the devices (else random draws may differ).
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
      validate: evaluate the validation users after each epoch; if False, return the parameters of the last epoch.
      checkpoint: file that holds the training after each epoch. The same call resumes from it, with the result of an
        uninterrupted run. Pass the same optimiser: only the shapes of its state are compared.
      told: extra run metadata, stored in the checkpoint as JSON and compared on resume.
      report: called after each epoch with its number and its entry of `history`.

    Raises:
      FloatingPointError: the loss is not finite.
      ModelFileError: `checkpoint` is damaged or belongs to another training.
    """
    kind, layout = target.kind, Layout(mesh)
    optimizer = default_optimizer() if optimizer is None else optimizer
    epochs = EPOCHS[kind] if epochs is None else epochs
    average = AVERAGE[kind] if average is None else average
    first = min(epochs // WARMUP[kind] if min_epochs is None else min_epochs, epochs - 1) if validate else epochs - 1
    shared = max_support, buckets, statistics, seed, layout
    if kind == "ranking":
        source = ranking(strategy, split, target, objective or Ranking(), query, batch_size, *shared)
    else:
        short = SHORT[kind] if short is None else short
        sampling = {"query": query, "batch_size": batch_size, "unknown": unknown, "short": short, "noise": noise}
        source = pointwise(strategy, split, target, sampling, *shared)
    current = _State.initial(strategy, optimizer, params, seed, layout)
    if strategy.fit and not jax.tree.leaves({n: x for n, x in current.params.items() if n != SHIFTS}):  # closed form
        return current.best._replace(params=_local(source.whole(current.best.params), layout))
    setting = source.setting | _identity(split, target, current.params, seed, average) | dict(told or {})
    _agree(layout, split, setting | {"epochs": epochs, "first": first, "patience": patience, "chunk": chunk})
    if checkpoint is not None:
        current = current.restored(checkpoint, setting, layout)
    for epoch in range(len(current.best.history), epochs):
        if epoch - 1 > first and epoch - 1 - current.best.epoch >= patience:
            break
        current, loss = _epoch(current, source, optimizer, chunk, layout)
        averaged = _average(current.averaged, current.params, average * (epoch > 0))
        entry = {"loss": loss} | (source.validate(averaged) if validate else {})
        if report is not None and layout.leads:
            report(epoch, entry)
        current = current._replace(averaged=averaged, best=_better(current.best, averaged, entry, kind, first))
        if checkpoint is not None and layout.leads:
            current.save(checkpoint, setting)
    return current.best._replace(params=_local(source.whole(current.best.params), layout))


def _identity(split: Split, target: Target, params: Params, seed: int, average: float) -> dict[str, Any]:
    """Return run metadata for checkpoints, compared on resume: users by hash, parameters by path."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    users = sha256(split.train.users.tobytes()).hexdigest()
    return {"seed": seed, "average": average, "target": asdict(target), "params": paths, "users": users}


def _agree(layout: Layout, split: Split, setting: dict[str, Any]) -> None:
    """Raise an error on all processes of a training if they differ in data, options or versions."""
    if layout.spans_processes:
        versions = {"metarec_jax": version("metarec-jax"), "jax": jax.__version__}
        layout.agree(setting | versions | {"data": fingerprint(split.train.data)})


def _better(best: Fitted, params: Params, entry: dict[str, float], kind: str, first: int) -> Fitted:
    """Append an epoch's entry to the history; keep its parameters if its metric is the best, or up to epoch `first`."""
    epoch, history = len(best.history), [*best.history, entry]
    metric, sign = SELECT[kind], -1 if kind in HIGHEST else 1
    if epoch <= first or sign * entry[metric] < sign * history[best.epoch][metric]:
        return Fitted(jax.device_get(params), epoch, history)
    return best._replace(history=history)


class _State(NamedTuple):
    """Training state between two epochs: everything that the next epoch depends on."""

    params: Params
    state: Any  # optimiser state
    averaged: Params
    best: Fitted
    rng: np.random.Generator
    key: jax.Array

    @classmethod
    def initial(
        cls,
        strategy: Strategy,
        optimizer: optax.GradientTransformation,
        params: Params | None,
        seed: int,
        layout: Layout,
    ) -> "_State":
        """Return the state before the first epoch; `params` are copied, because `_step` donates its arguments."""
        init_key, key = jax.random.split(jax.random.key(seed))
        params = jax.jit(strategy.init)(init_key) if params is None else jax.tree.map(jnp.array, params)
        start = jax.device_get(params)
        state = jax.jit(optimizer.init)(params)
        best = Fitted(start, -1, [])
        return cls(layout.place(params), layout.place(state), start, best, np.random.default_rng(seed), key)

    def save(self, path: str | Path, setting: dict[str, Any]) -> None:
        past = {"history": self.best.history, "best": self.best.epoch, "rng": self.rng.bit_generator.state}
        write(path, self._arrays(), past | {"key": jax.random.key_data(self.key).tolist()}, setting)

    def restored(self, path: str | Path, setting: dict[str, Any], layout: Layout) -> "_State":
        """Return the state that `save` wrote, or this initial state if there is no file yet."""
        saved = read(path, self._arrays(), setting)
        if not saved:
            return self
        arrays, past = saved
        params, state = layout.place((arrays["params"], arrays["state"]))
        best = Fitted(arrays["best"], past["best"], past["history"])
        self.rng.bit_generator.state = past["rng"]
        key = jax.random.wrap_key_data(jnp.array(past["key"], jnp.uint32))
        return _State(params, state, arrays["averaged"], best, self.rng, key)

    def _arrays(self) -> dict[str, Any]:
        return {"params": self.params, "state": self.state, "averaged": self.averaged, "best": self.best.params}


def _epoch(
    current: _State, source: Source, optimizer: optax.GradientTransformation, chunk: int | None, layout: Layout
) -> tuple[_State, float]:
    """Run the meta-steps of one epoch and return the mean loss of its batches."""
    params, state, key = current.params, current.state, current.key
    losses = []
    for task, tables in source.batches(current.rng):
        key, step_key = jax.random.split(key)
        step_key = layout.place(step_key)
        params, state, aux = _step(
            params, state, tables, task, step_key, loss=source.loss, optimizer=optimizer, chunk=chunk, layout=layout
        )
        losses.append(aux["loss"])
    loss = float(np.mean(jax.device_get(losses)))
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the meta-loss became {loss} in epoch {len(current.best.history)}; lower the outer learning rate or the "
            "inner step size; inner Adam needs optax.adam(..., eps_root=1e-8)"
        )
    return current._replace(params=params, state=state, key=key), loss


@partial(jax.jit, static_argnames=("loss", "optimizer", "chunk", "layout"), donate_argnames=("params", "state"))
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
    layout: Layout,
) -> Any:
    """Run `meta_step`, compiled once per loss, optimiser and shape, across calls of `fit`.

    The tables are merged into the parameters of the loss only, so neither gradients nor the optimiser reach them.
    """

    def loss_with_tables(params: Params, task: Task, key: jax.Array) -> Any:
        return loss({**params, TABLES: tables} if tables else params, task, key)

    return layout.shared(meta_step(loss_with_tables, optimizer, chunk=chunk)(params, state, task, key))


def _local(params: Params, layout: Layout) -> Params:
    """Return parameters that this process holds whole, off the mesh."""
    return params if layout.mesh is None else layout.gather(params)


@jax.jit
def _average(averaged: Params, params: Params, keep: float) -> Params:
    return optax.incremental_update(params, averaged, 1 - keep)
