"""Candidates: the items among which a query is ranked.

These are the query itself, the query and sampled items, or the whole catalogue.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from metarec_jax.data.schema import ORDER
from metarec_jax.tasks.batching import Batch, features
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target
from metarec_jax.types import Examples

Among = int | Literal["query", "all"]


class Candidates(NamedTuple):
    """Candidates of each user: the query first, then the items ranked against it.

    Attributes:
      item: `[users, width]` item rows.
      interaction: `[users, width]` positions of the interactions; -1 for items without one.
      target: `[users, width]` targets; 0 for items without an interaction.
      mask: `[users, width]` 0 for padding.
    """

    item: np.ndarray
    interaction: np.ndarray
    target: np.ndarray
    mask: np.ndarray


def candidates(
    histories: Histories,
    target: Target,
    among: Among = "query",
    *,
    query: int = 10,
    seed: int = 0,
    width: int | None = None,
) -> Candidates:
    """Select the candidates of every user, in the order of the histories.

    Args:
      histories: the users; the first `query` interactions of each are the query.
      target: mapping of ratings to targets.
      among: "query": the query only. A number: the query and this many items, sampled from those without an interaction
        of the user (fewer if there are fewer). "all": the query and all such items. Items without an interaction count
        as not clicked.
      query: largest query size.
      seed: seed of the samples; a user's sample depends on it and the user row only.
      width: padded number of items besides the query (default: that of `most_others`).

    Raises:
      ValueError: `among` is unknown, or not "query" for a rating target, which unseen items lack.
    """
    _check(target, among)
    data, column = histories.data, np.arange(query)
    count = np.minimum(query, np.maximum(histories.lengths - 1, 0))[:, None]
    mask = column < count
    index = np.where(mask, histories.index[np.where(mask, histories.starts[:-1, None] + column, 0)], -1)
    item = np.where(mask, data.item[index], 0)
    values = np.where(mask, target.encode(data.rating[index]), 0)
    of_query = Candidates(item, index, values.astype(np.float32), mask.astype(np.float32))
    if among == "query":
        return of_query
    others = [_unseen(histories, u, among, seed) for u in range(len(histories))]
    width = max(map(len, others)) if width is None else width
    other_items = np.zeros((len(others), width), np.int64)
    for row, unseen in zip(other_items, others, strict=True):
        row[: len(unseen)] = unseen
    of_others: Any = (
        other_items,
        np.full_like(other_items, -1),
        np.zeros(other_items.shape, np.float32),
        (other_items > 0).astype(np.float32),
    )
    item, index, values, mask = (np.concatenate([a, b], 1) for a, b in zip(of_query, of_others, strict=True))
    return Candidates(item, index, values, mask)


def most_others(histories: Histories, target: Target, among: Among) -> int:
    """Return the largest number of candidates besides the query, over all users; arguments as in `candidates`."""
    _check(target, among)
    if among == "query":
        return 0
    items = len(histories.data.items)
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    pairs = np.unique(owner * items + histories.data.item[histories.index])
    unseen = items - 1 - np.bincount(pairs // items, minlength=len(histories))
    return int(unseen.max(initial=0) if among == "all" else np.minimum(unseen, among).max(initial=0))


def _check(target: Target, among: Any) -> None:
    if among not in ("query", "all") and (isinstance(among, bool | str) or among < 1):
        raise ValueError(f'candidates must be "query", "all" or how many to sample, got {among!r}')
    if among != "query" and target.kind != "click":
        raise ValueError('items without a rating can only be ranked against clicks: use candidates="query"')


def _unseen(histories: Histories, u: int, among: Any, seed: int) -> np.ndarray:
    """Return the item rows without an interaction of user `u`: all, or a sample."""
    data = histories.data
    seen, items = data.item[histories.index[histories.starts[u] : histories.starts[u + 1]]], len(data.items) - 1
    if among == "all":
        unseen = np.arange(items + 1) > 0
        unseen[seen] = False
        return np.flatnonzero(unseen)
    rng = np.random.default_rng([seed, int(histories.users[u])])
    drawn = 1 + rng.choice(items, min(items, among + len(seen)), replace=False)
    return drawn[~np.isin(drawn, seen)][:among]


def judged_on(batch: Batch, histories: Histories, chosen: Candidates) -> Batch:
    """Replace the queries of a task batch by candidates.

    Args:
      batch: the task batch.
      histories: the histories of the batch and of the candidates.
      chosen: candidates; padding users get none.
    """
    at, query = batch.positions, batch.task.query
    item, index, target, mask = (array[at] for array in chosen)
    gathered = features(histories.data, histories.users[at], item, index)
    last = np.where(query.mask > 0, query.features[ORDER], 0).max(1)[: len(at), None]
    gathered[ORDER] = np.where(index >= 0, histories.data.order[index], last).astype(query.features[ORDER].dtype)

    def filled(x: np.ndarray) -> Any:
        return np.concatenate([x, np.zeros((len(query.mask) - len(x), *x.shape[1:]), x.dtype)])

    query_examples = Examples({k: filled(v) for k, v in gathered.items()}, filled(target), filled(mask))
    return batch._replace(task=batch.task._replace(query=query_examples))
