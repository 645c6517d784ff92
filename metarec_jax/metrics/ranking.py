"""Ranking metrics: how well a learner finds the items that users chose, by support size."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core.columns import set_columns
from metarec_jax.core.layout import ONE_DEVICE, Layout
from metarec_jax.errors import DataError
from metarec_jax.strategies.catalogue import adapt, score_shared
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.wrappers.ranked import TABLES
from metarec_jax.tasks.ranking import Known, RankingTask, ranking_tasks
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target
from metarec_jax.types import Params

SIZES = (1, 3, 5, 10, None)  # support sizes; None for all
DEPTH = 100  # length of the evaluated lists
CELLS = 1 << 24  # users x items scored at once


class Lists(NamedTuple):
    """Recommended lists and their hits.

    Attributes:
      rows: `[users, depth]` item rows, best first; -1 where no item is left.
      hits: `[users, depth]` bool, whether each is one of the user's query items.
      positives: `[users]` number of query items.

    Example:
      Two users with lists of two items. The first has one of three query items in the list, the second none of one:

      >>> rows, hits = np.array([[7, 8], [9, 7]]), np.array([[True, False], [False, False]])
      >>> lists = mr.metrics.Lists(rows, hits, positives=np.array([3, 1]))
      >>> mr.metrics.list_metrics(lists)["recall@20"].round(3)
      array([0.333, 0.   ])
    """

    rows: np.ndarray
    hits: np.ndarray
    positives: np.ndarray


@partial(jax.jit, static_argnums=(0, 3))
def best(strategy: Strategy, params: Params, known: Known, depth: int) -> jax.Array:
    """Return the best items that are not in the support.

    Args:
      strategy, params: the strategy and its parameters, with the catalogue.
      known: the users.
      depth: length of the lists.

    Returns:
      `[users, depth]` item rows; -1 where none is left.
    """
    items = params[TABLES]["items"]
    scores = score_shared(strategy, params, adapt(strategy, params, items, known), known, items)
    return top_rows(scores, jnp.where(known.weight > 0, known.items, 0), depth)


def top_rows(scores: jax.Array, seen: jax.Array, depth: int) -> jax.Array:
    """Return the best columns of a score matrix, without row 0 of the catalogue and seen items.

    Args:
      scores: `[users, items]`; NaN counts as -inf.
      seen: `[users, n]` item rows to exclude.
      depth: length of the lists.

    Returns:
      `[users, depth]`, or `[users, items]` if there are fewer items; -1 where none is left.
    """
    low = set_columns(scores.at[:, 0].set(-jnp.inf), seen, -jnp.inf)
    value, rows = jax.lax.top_k(jnp.where(jnp.isnan(low), -jnp.inf, low), min(depth, scores.shape[1]))
    return jnp.where(value > -jnp.inf, rows, -1)


def rank(
    strategy: Strategy,
    params: Params,
    histories: Histories,
    target: Target,
    *,
    query: int = 10,
    support: int | None = None,
    depth: int = DEPTH,
    layout: Layout = ONE_DEVICE,
) -> Lists:
    """Compute the lists of a ranking strategy.

    Args:
      strategy, params: the strategy and its parameters.
      histories, target, query, support: as in `ranking_tasks`.
      depth: length of the lists.
      layout: the devices that hold `params`, over which the users are sharded.

    Example:
      The score of this strategy is the item row, so it recommends the last rows; 39 is in the support of the user:

      >>> data = mr.data.synthetic(users=30, items=40)
      >>> test = mr.StrongGeneralisation(threshold=3.5).split(data).test
      >>> strategy = mr.strategies.Strategy(
      ...     init=lambda key: {}, adapt=lambda params, support, key: support.mask[:, :1], loss=None,
      ...     predict=lambda params, adapted, features: 1.0 * features["item_id"])
      >>> params = {"tables": {"items": {"item_id": jnp.arange(41)}}}
      >>> mr.metrics.rank(strategy, params, test, mr.tasks.Target("ranking", 3.5), depth=3).rows[0]
      array([40, 38, 37], dtype=int32)
    """

    def recommend(task: RankingTask) -> np.ndarray:
        return layout.gather(best(strategy, params, layout.batch(task.known), depth))[: len(task.query.mask)]

    return lists_of(recommend, histories, target, query=query, support=support)


def lists_of(
    recommend: Callable[[RankingTask], Any],
    histories: Histories,
    target: Target,
    *,
    query: int = 10,
    support: int | None = None,
) -> Lists:
    """Compute the lists of any recommender and their hits.

    Args:
      recommend: maps a batch of ranking tasks to item rows `[users, depth]`.
      histories: the users.
      target: mapping of ratings to targets.
      query, support: as in `ranking_tasks`.

    Raises:
      DataError: no user has a positive in the query.
    """
    most = int(np.clip(CELLS // len(histories.data.items), 1, 256))
    batches = max(-(-len(histories) // most), 1)
    size = min(
        most, 32 * max(-(-len(histories) // (32 * batches)), 1)
    )  # test and validation users share a compiled program
    parts: list[Any] = []
    for task in ranking_tasks(histories, target, query=query, support=support, batch_size=size):
        rows = np.asarray(recommend(task))
        wanted = np.where(task.query.mask > 0, task.query.rows, -2)
        parts.append((rows, (rows[:, :, None] == wanted[:, None, :]).any(2), (wanted > 0).sum(1)))
    lists = Lists(*(np.concatenate(x)[: len(histories)] for x in zip(*parts, strict=True)))
    if not lists.positives.any():
        raise DataError(
            f"{histories.data.name}: none of {len(histories)} users has a positive in the query (threshold "
            f"{target.threshold:g}), so that there is nothing to find; give the protocol a lower threshold"
        )
    return lists


def list_metrics(lists: Lists) -> dict[str, np.ndarray]:
    """Compute the metrics of lists, each `[users]`; NaN for users without a query item.

    nDCG and recall are those of Liang et al. (WWW 2018): the ideal list and the denominator hold min(k, positives).

    Args:
      lists: recommended lists and hits.

    Example:
      One user whose two query items are first and third of the list:

      >>> lists = mr.metrics.Lists(np.array([[7, 8, 9]]), np.array([[True, False, True]]), np.array([2]))
      >>> table = mr.metrics.list_metrics(lists)
      >>> round(float(table["ndcg@10"][0]), 4)  # (1 + 1 / log2(4)) / (1 + 1 / log2(3))
      0.9197
      >>> float(table["recall@20"][0]), float(table["mrr@10"][0])
      (1.0, 1.0)
    """
    hits, positives = lists.hits, lists.positives
    depth = hits.shape[1]
    discount = 1 / np.log2(np.arange(2, depth + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    defined = np.where(positives > 0, 1.0, np.nan)
    metrics = {}
    for k in (10, 100):
        gain = (hits[:, :k] * discount[:k]).sum(1)
        metrics[f"ndcg@{k}"] = defined * gain / np.maximum(ideal[np.minimum(np.minimum(k, depth), positives)], 1e-9)
    for k in (20, 50):
        metrics[f"recall@{k}"] = defined * hits[:, :k].sum(1) / np.maximum(np.minimum(k, positives), 1)
    metrics["hit_rate@10"] = defined * hits[:, :10].any(1)
    metrics["mrr@10"] = defined * np.where(hits[:, :10].any(1), 1 / (1.0 + hits[:, :10].argmax(1)), 0)
    return metrics


def by_support(make: Callable[[int | None], Lists], sizes: Sequence[int | None] = SIZES) -> dict[str, np.ndarray]:
    """Compute nDCG@100 by support size, and the other metrics with the full support; each `[users]`.

    Args:
      make: computes the lists for a support size; None is the full support.
      sizes: support sizes.

    Returns:
      Metrics by name; with n support examples the name is "ndcg@100, n known".
    """
    metrics: dict[str, np.ndarray] = {}
    for size in sizes:
        table = list_metrics(make(size))
        metrics |= table if size is None else {f"ndcg@100, {size} known": table["ndcg@100"]}
    return metrics
