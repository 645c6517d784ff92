"""Candidates: among which items a query is ranked: its own, sampled ones besides, or the whole catalogue."""

from typing import Any, Literal, NamedTuple

import numpy as np

from metarec_jax.tasks.batching import Batch, features
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target
from metarec_jax.types import Examples

Among = int | Literal["query", "all"]


class Candidates(NamedTuple):
    """What each user of some histories is judged on: the query first, then the items ranked against it.

    Attributes:
      item: `[users, width]` item rows.
      interaction: `[users, width]` positions of the interactions, -1 of what the user has none with.
      target: `[users, width]`; 0 of what the user has no interaction with.
      mask: `[users, width]`.
    """

    item: np.ndarray
    interaction: np.ndarray
    target: np.ndarray
    mask: np.ndarray


def candidates(
    histories: Histories, target: Target, among: Among = "query", *, query: int = 10, seed: int = 0
) -> Candidates:
    """The candidates of every user, in the order of the histories.

    Args:
      histories: the users; the first `query` interactions of each are the query.
      target: ratings to targets.
      among: "query": the query alone. A number: so many items besides, drawn from those that the user has no
        interaction with (fewer where there are fewer). "all": all those items. They count as not clicked.
      query: largest query size.
      seed: of the draw; a user's items depend on nothing else.

    Raises:
      ValueError: an unknown `among`, or one other than "query" where ratings are predicted, which unseen items lack.
    """
    if among not in ("query", "all") and (isinstance(among, bool | str) or among < 1):
        raise ValueError(f'candidates must be "query", "all" or how many to sample, got {among!r}')
    if among != "query" and target.kind != "click":
        raise ValueError('items without a rating can only be ranked against clicks: use candidates="query"')
    data, column = histories.data, np.arange(query)
    count = np.minimum(query, np.maximum(histories.lengths - 1, 0))[:, None]
    mask = column < count
    index = np.where(mask, histories.index[np.where(mask, histories.starts[:-1, None] + column, 0)], -1)
    item = np.where(mask, data.item[index], 0)
    values = np.where(mask, target.encode(data.rating[index]), 0)
    found = Candidates(item, index, values.astype(np.float32), mask.astype(np.float32))
    if among == "query":
        return found
    others = [_unseen(histories, u, among, seed) for u in range(len(histories))]
    width = max(map(len, others))
    more = np.zeros((len(others), width), np.int64)
    for row, unseen in zip(more, others, strict=True):
        row[: len(unseen)] = unseen
    rest: Any = (more, np.full_like(more, -1), np.zeros(more.shape, np.float32), (more > 0).astype(np.float32))
    item, index, values, mask = (np.concatenate([a, b], 1) for a, b in zip(found, rest, strict=True))
    return Candidates(item, index, values, mask)


def _unseen(histories: Histories, u: int, among: Any, seed: int) -> np.ndarray:
    """Item rows without an interaction of user `u`."""
    data = histories.data
    seen, everything = data.item[histories.index[histories.starts[u] : histories.starts[u + 1]]], len(data.items) - 1
    if among == "all":
        return np.setdiff1d(np.arange(1, everything + 1), seen)
    rng = np.random.default_rng([seed, int(histories.users[u])])
    drawn = 1 + rng.choice(everything, min(everything, among + len(seen)), replace=False)
    return drawn[~np.isin(drawn, seen)][:among]


def judged_on(batch: Batch, histories: Histories, chosen: Candidates) -> Batch:
    """The task batch with `chosen`, candidates of the same histories, as its queries; its filling users keep none."""
    at, query = batch.positions, batch.task.query
    item, index, target, mask = (array[at] for array in chosen)
    found = features(histories.data, histories.users[at], item, index)
    last = np.where(query.mask > 0, query.features["order"], 0).max(1)[: len(at), None]
    found["order"] = np.where(index >= 0, histories.data.order[index], last).astype(query.features["order"].dtype)

    def filled(x: np.ndarray) -> Any:
        return np.concatenate([x, np.zeros((len(query.mask) - len(x), *x.shape[1:]), x.dtype)])

    judged = Examples({k: filled(v) for k, v in found.items()}, filled(target), filled(mask))
    return batch._replace(task=batch.task._replace(query=judged))
