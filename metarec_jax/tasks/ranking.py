"""Ranking tasks: the known interactions of users, and the catalogue items that they chose."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax.data.fields import Field
from metarec_jax.tasks.batching import bucket_sizes
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

LONGEST = 512  # most support examples


class Known(NamedTuple):
    """Known interactions and attributes of a batch of users.

    Attributes:
      items: `[users, examples]` int32 rows of the interacted items, in order of time.
      target: `[users, examples]` float32 targets of the interactions, see `Target.grade`.
      weight: `[users, examples]` float32 weights; 0 for padding.
      user: encoded user attributes, each `[users, ...]`.
      context: encoded contexts of the recommendation, each `[users, ...]`.
      past: encoded contexts of the interactions, each `[users, examples, ...]`; None: unknown.
    """

    items: Any  # numpy or JAX arrays
    target: Any
    weight: Any
    user: dict[str, Any]
    context: dict[str, Any]
    past: dict[str, Any] | None = None

    @classmethod
    def blank(cls, users: int, width: int, user: Sequence[Field], context: Sequence[Field]) -> "Known":
        """Return a zero-initialised batch of users with unknown attributes and contexts."""
        rows = [{f.name: np.repeat(f.unknown()[None], users, 0) for f in fields} for fields in (user, context)]
        past = {name: np.repeat(value[:, None], width, 1) for name, value in rows[1].items()}
        items, target, weight = (np.zeros((users, width), dtype) for dtype in (np.int32, np.float32, np.float32))
        return cls(items, target, weight, rows[0], rows[1], past)


class Chosen(NamedTuple):
    """Items that users chose: rows `[users, query]` int32, and a mask of the same shape, 0 for padding."""

    rows: Any
    mask: Any


class RankingTask(NamedTuple):
    """A batch of users: adapt to `known`, then rank `query` among all items.

    For `ranking_loss(..., following=True)` the query is `[users, examples + 1]`: entry t is the item after the first t.
    """

    known: Known
    query: Chosen


def known_of(
    histories: Histories, target: Target, positions: np.ndarray, begin: np.ndarray, count: np.ndarray, width: int
) -> Known:
    """Gather the interactions `begin : begin + count` of each user, in order of time.

    Args:
      histories: the users.
      target: mapping of ratings to targets.
      positions: `[users]` positions in `histories`.
      begin, count: `[users]` first interaction and number of interactions.
      width: padded width; further interactions are cut.
    """
    data, column = histories.data, np.arange(width)
    mask = column < np.minimum(count, width)[:, None]
    index = histories.index[np.where(mask, begin[:, None] + column, 0)]
    by_time = np.argsort(np.where(mask, data.order[index], np.iinfo(np.int32).max), axis=1, kind="stable")
    index = np.take_along_axis(index, by_time, 1)
    users = histories.users[positions]
    past = {}
    for field in data.context_fields:
        value = data.context_features[field.name][index]
        past[field.name] = np.where(mask.reshape(mask.shape + (1,) * (value.ndim - 2)), value, field.unknown())
    return Known(
        np.where(mask, data.item[index], 0).astype(np.int32),
        np.where(mask, target.grade(data.rating[index]), 0).astype(np.float32),
        mask.astype(np.float32),
        {name: table[users] for name, table in data.user_features.items()},
        {f.name: np.repeat(f.unknown()[None], len(users), 0) for f in data.context_fields},
        past,
    )


def queries_of(histories: Histories, query: int) -> np.ndarray:
    """Return the query size of each user, `[users]`."""
    if histories.queries is not None:
        return histories.queries
    return np.minimum(query, np.maximum(histories.lengths - 1, 0))


def ranking_tasks(
    histories: Histories, target: Target, *, query: int = 10, support: int | None = None, batch_size: int = 256
) -> Iterator[RankingTask]:
    """Yield all users in order, as batches of one shape; the last is padded with users whose masks are 0.

    Args:
      histories: the users; the positives among each user's first interactions are the query.
      target: mapping of ratings to targets.
      query: largest query size, if `histories` has no `queries`.
      support: largest support size (None: all, up to `LONGEST`).
      batch_size: users a batch.
    """
    data, queries = histories.data, queries_of(histories, query)
    supports = np.minimum(histories.lengths - queries, LONGEST if support is None else min(support, LONGEST))
    (width,) = bucket_sizes(np.maximum(supports, 16), 1)
    (query_width,) = bucket_sizes(queries, 1)
    for start in range(0, len(histories), batch_size):
        positions = np.arange(start, min(start + batch_size, len(histories)))
        begin = histories.starts[positions]
        known = known_of(histories, target, positions, begin + queries[positions], supports[positions], width)
        column = np.arange(query_width)
        mask = column < queries[positions, None]
        index = histories.index[np.where(mask, begin[:, None] + column, 0)]
        mask &= data.rating[index] >= target.threshold
        rows = np.where(mask, data.item[index], 0).astype(np.int32)
        context = {name: table[index[:, 0]] for name, table in data.context_features.items()}
        task = RankingTask(known._replace(context=context), Chosen(rows, mask.astype(np.float32)))
        yield jax.tree.map(partial(_filled, batch_size), task)


def _filled(size: int, x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)]) if len(x) < size else x
