"""Scoring: scores of a strategy on task batches, and their metrics."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax.metrics import pointwise as metrics
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.batching import Batch
from metarec_jax.tasks.target import Target
from metarec_jax.types import Params, Task


class Scores(NamedTuple):
    """Scores of the query interactions of some users, in the order of the histories.

    Attributes:
      scores: `[users, query]` click probabilities or ratings.
      target: `[users, query]` 0/1 clicks or ratings.
      mask: `[users, query]` 0 for padding.
    """

    scores: np.ndarray
    target: np.ndarray
    mask: np.ndarray


@partial(jax.jit, static_argnums=0)
def score(strategy: Strategy, params: Params, task: Task, key: jax.Array) -> jax.Array:
    """Adapt to the support sets and score the queries; compiled once a shape.

    Args:
      strategy, params: the strategy and its parameters.
      task: a task batch.
      key: random key of the adaptation.

    Returns:
      Raw scores `[users, query]`.
    """
    return strategy.predict(params, strategy.adapt(params, task.support, key), task.query.features)


def score_tasks(strategy: Strategy, params: Params, tasks: Iterator[Batch], target: Target) -> Scores:
    """Score all task batches; scores and targets are decoded.

    Args:
      strategy, params: the strategy and its parameters.
      tasks: task batches, as from `batches`.
      target: mapping of ratings to targets.
    """
    parts: list[Any] = []
    positions = []
    for batch in tasks:
        n, query = len(batch.positions), batch.task.query
        raw = np.asarray(score(strategy, params, batch.task, jax.random.key(0)))[:n]
        wanted, mask = np.asarray(query.target[:n]), np.asarray(query.mask[:n])
        truth = wanted if target.kind == "click" else target.decode(wanted)
        parts.append((target.decode(raw), truth, mask))
        positions.append(batch.positions)
    order = np.argsort(np.concatenate(positions))
    return Scores(*(np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)))


def summarise(scores: Scores, kind: str) -> dict[str, float]:
    """Compute the metrics of some scores, as Python floats.

    Args:
      scores: scores of the queries.
      kind: "click" or "rating".
    """
    table: Callable[..., dict[str, Any]] = metrics.click_metrics if kind == "click" else metrics.rating_metrics
    return {name: float(value) for name, value in table(*scores).items()}
