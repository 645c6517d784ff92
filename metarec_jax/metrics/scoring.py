"""Scoring: scores of a strategy on task batches, and their metrics."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax.core.layout import ONE_DEVICE, Layout
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

    Example:
      >>> scores = mr.metrics.Scores(np.array([[4.0, 1.0]]), np.array([[3.0, 8.0]]), np.ones((1, 2)))
      >>> mr.metrics.summarise(scores, "rating")["rmse"]  # the root of the mean of 1 and 49
      5.0
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


def score_tasks(
    strategy: Strategy, params: Params, tasks: Iterator[Batch], target: Target, layout: Layout = ONE_DEVICE
) -> Scores:
    """Score all task batches; scores and targets are decoded.

    Args:
      strategy, params: the strategy and its parameters.
      tasks: task batches, as from `batches`.
      target: mapping of ratings to targets.
      layout: the devices that hold `params`, over which the users are sharded.

    Example:
      A strategy that predicts the mean of the support set, here 4 of the ratings 3 and 5:

      >>> mean = mr.strategies.Strategy(
      ...     init=lambda key: {}, adapt=lambda params, support, key: support.target.mean(1, keepdims=True), loss=None,
      ...     predict=lambda params, adapted, features: jnp.broadcast_to(adapted, features["item_id"].shape))
      >>> data = mr.data.from_tables({"user_id": [1, 1, 1], "item_id": [7, 8, 9], "rating": [1, 3, 5]})
      >>> histories, target = mr.tasks.Histories.of(data, np.array([1])), mr.tasks.Target("rating")
      >>> batches = mr.tasks.batches(histories, target, query=1, batch_size=1, buckets=(2,))
      >>> mr.metrics.score_tasks(mean, {}, batches, target).scores
      array([[4.]], dtype=float32)
    """
    parts: list[Any] = []
    positions = []
    key = layout.place(jax.random.key(0))
    for batch in tasks:
        n, query = len(batch.positions), batch.task.query
        raw = layout.gather(score(strategy, params, layout.batch(batch.task), key))[:n]
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

    Example:
      >>> scores = mr.metrics.Scores(np.array([[0.9, 0.4]]), np.array([[1.0, 0.0]]), np.ones((1, 2)))
      >>> table = mr.metrics.summarise(scores, "click")
      >>> table["auc"], table["accuracy"]
      (1.0, 1.0)
    """
    table: Callable[..., dict[str, Any]] = metrics.click_metrics if kind == "click" else metrics.rating_metrics
    return {name: float(value) for name, value in table(*scores).items()}
