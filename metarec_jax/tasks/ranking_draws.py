"""Draws of ranking tasks: supports and queries of the training users, anew each epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from metarec_jax.errors import DataError
from metarec_jax.tasks.batching import bucket_sizes
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.ranking import LONGEST, Chosen, RankingTask, known_of
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

USERS = 4096  # training users an epoch, at most
EMPTY = 0.15  # share of empty supports among the short ones


def widths_of(histories: Histories, most: int, buckets: int) -> tuple[int, ...]:
    """Padded support widths for the users of some histories."""
    return bucket_sizes(np.clip(histories.lengths, 1, min(most, LONGEST)), buckets)


def drawn(
    histories: Histories,
    target: Target,
    objective: Ranking,
    *,
    batch_size: int,
    widths: tuple[int, ...],
    fold: np.ndarray,
    rng: np.random.Generator,
    following: bool = False,
) -> Iterator[tuple[RankingTask, int]]:
    """Training users once, in batches whose users are of one fold, each with a support and a query drawn anew.

    A user's positives are shuffled, or, where histories are ordered, cut at a random moment. `Ranking.short` of the
    users show a number of positives that is log-uniform from 1, or now and then 0, the others four fifths; the rest is
    the query.

    With `following` a support holds all that came before the last positive, and the query is what came next at each of
    its places, `[users, width + 1]`, masked where that is no positive. Users with supports of about the same size share
    a batch.

    Args:
      histories: training users; those with fewer than two positives are left out.
      target: ratings to targets.
      objective: the shares of what is drawn.
      batch_size: users a batch; the last one is filled up.
      widths: padded support widths.
      fold: `[users]` of each.
      rng: of all draws.
      following: what `ranking_loss` with `following` reads; histories must be ordered.

    Yields:
      The task and its fold.

    Raises:
      DataError: no user has two positives.
    """
    data = histories.data
    positive = data.rating[histories.index] >= target.threshold
    count = np.add.reduceat(np.append(positive, False).astype(int), histories.starts[:-1]) * (histories.lengths > 0)
    chosen = rng.permutation(np.flatnonzero(count >= 2))[:USERS]
    if not len(chosen):
        raise DataError(
            f"{data.name}: no training user has two positives (threshold {target.threshold:g}), one to know and one to "
            "find; give the protocol a lower threshold"
        )
    if following:
        chosen = chosen[np.argsort(np.minimum(histories.lengths[chosen], widths[-1]), kind="stable")]
    pieces = [
        piece
        for f in np.unique(fold)
        for piece in np.array_split(chosen[fold[chosen] == f], max(1, -(-int((fold[chosen] == f).sum()) // batch_size)))
        if len(piece)
    ]
    for i in rng.permutation(len(pieces)):
        piece = pieces[i]
        one = _every_place if following else _one
        supports, queries = zip(*(one(histories, positive, u, objective, widths[-1], rng) for u in piece), strict=True)
        width = widths[int(np.searchsorted(widths, max(map(len, supports), default=0)))]
        known = _padded(supports, batch_size, width)
        query = _padded(queries, batch_size, width + 1 if following else objective.query)
        users = np.zeros(batch_size, np.int64)
        users[: len(piece)] = np.where(rng.random(len(piece)) < objective.unknown, 0, histories.users[piece])
        flat = Histories(data, users, np.arange(batch_size + 1) * width, np.maximum(known, 0).ravel())
        at = np.arange(batch_size)
        found = known_of(flat, target, at, flat.starts[:-1], (known >= 0).sum(1), width)
        mask = query >= 0
        around: dict[str, Any] = {}
        for name, table in data.context_features.items():  # what is to be found was chosen in one context
            own = table[np.maximum(query, 0)]
            around[name] = own[:, 0]
            if not following:
                mask &= (own == own[:, :1]).reshape(*query.shape, -1).all(-1)
        rows = np.where(mask, data.item[np.maximum(query, 0)], 0).astype(np.int32)
        task = RankingTask(found._replace(context=around), Chosen(rows, mask.astype(np.float32)))
        yield task, int(fold[piece[0]])


def _one(
    histories: Histories, positive: np.ndarray, u: int, objective: Ranking, most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the interactions of one user's support and query."""
    span = slice(histories.starts[u], histories.starts[u + 1])
    index, liked = histories.index[span], positive[span]
    if not histories.ordered:
        order = rng.permutation(len(index))
        index, liked = index[order], liked[order]
    else:  # from the latest to the first: what is to be found comes before what is known
        index, liked = index[::-1], liked[::-1]
    places = np.flatnonzero(liked)
    n = max(1, round(0.8 * len(places)))
    if rng.random() < objective.short:
        n = 0 if rng.random() < EMPTY else int(np.exp(rng.random() * np.log(n + 1)))
    n = min(n, len(places) - 1)
    query = index[places[n:]]
    if histories.ordered:
        query = query[: max(1, len(places) // 5)]
        known = index[: places[n]]
        known = known if rng.random() < objective.dislikes else known[liked[: places[n]]]
        return known[-most:], query[: objective.query]
    support = index[places[:n]]
    if rng.random() < objective.dislikes:
        support = np.concatenate([support, index[~liked]])
    return support[:most], rng.permutation(query)[: objective.query]


def _every_place(
    histories: Histories, positive: np.ndarray, u: int, objective: Ranking, most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the interactions before one user's last positive, the latest `most`, and of what came next at each
    place, -1 where that is no positive."""
    span = slice(histories.starts[u], histories.starts[u + 1])
    index, liked = histories.index[span][::-1], positive[span][::-1]
    if rng.random() >= objective.dislikes:
        index, liked = index[liked], liked[liked]
    latest = slice(max(0, np.flatnonzero(liked)[-1] - most), np.flatnonzero(liked)[-1] + 1)
    index, liked = index[latest], liked[latest]
    return index[:-1], np.where(liked, index, -1)


def _padded(rows: Any, size: int, width: int) -> np.ndarray:
    """`[size, width]`, -1 where there is nothing."""
    found = np.full((size, width), -1, np.int64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row[:width]
    return found
