"""Sampling of ranking tasks: support and query sets of the training users, drawn anew each epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from metarec_jax.errors import DataError
from metarec_jax.tasks.batching import bucket_sizes
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.ranking import LONGEST, Chosen, RankingTask, known_of
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

USERS = 4096  # most training users an epoch
NO_FOLD = -1  # of users that are never drawn
EMPTY = 0.15  # share of empty support sets among the short ones


def widths_of(histories: Histories, most: int, buckets: int) -> tuple[int, ...]:
    """Choose padded support widths for some histories.

    Args:
      histories: the users.
      most: supports are cut to this many examples, and to `LONGEST`.
      buckets: largest number of widths.
    """
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
    """Yield batches of ranking tasks that cover the users of all folds once (at most `USERS` of them).

    A user's positives are shuffled, or, if histories are ordered, cut at a random time. The first part is the support,
    the rest (if ordered, at most the next fifth) the query. A share `objective.short` of the users gets a support size
    that is log-uniform from 1, or 0 with probability `EMPTY`; the others get four fifths of their positives. All users
    of a batch belong to one fold.

    With `following`, the support holds the interactions before the last positive, and the query the next item at each
    position, `[users, width + 1]`, masked where that is not a positive. Users with supports of similar size then share
    a batch.

    Args:
      histories: training users; those with fewer than two positives are skipped.
      target: mapping of ratings to targets.
      objective: settings of the ranking objective.
      batch_size: users a batch; smaller batches are padded.
      widths: padded support widths, ascending.
      fold: `[users]` fold of each user; `NO_FOLD` for users that are not drawn.
      rng: generator of all draws.
      following: draw tasks for `ranking_loss(..., following=True)`; histories must be ordered.

    Yields:
      The task and its fold.

    Raises:
      DataError: no user has two positives.
    """
    data = histories.data
    positive = data.rating[histories.index] >= target.threshold
    count = np.add.reduceat(np.append(positive, False).astype(int), histories.starts[:-1]) * (histories.lengths > 0)
    chosen = rng.permutation(np.flatnonzero((count >= 2) & (fold != NO_FOLD)))[:USERS]
    if not len(chosen):
        raise DataError(
            f"{data.name}: no training user has two positives (threshold {target.threshold:g}), one for the support "
            "and one for the query; give the protocol a lower threshold"
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
        draw = _next_items if following else _draw_user
        supports, queries = zip(*(draw(histories, positive, u, objective, widths[-1], rng) for u in piece), strict=True)
        width = widths[int(np.searchsorted(widths, max(map(len, supports), default=0)))]
        known = _padded(supports, batch_size, width)
        query = _padded(queries, batch_size, width + 1 if following else objective.query)
        users = np.zeros(batch_size, np.int64)
        users[: len(piece)] = np.where(rng.random(len(piece)) < objective.unknown, 0, histories.users[piece])
        flat = Histories(data, users, np.arange(batch_size + 1) * width, np.maximum(known, 0).ravel())
        position = np.arange(batch_size)
        known_batch = known_of(flat, target, position, flat.starts[:-1], (known >= 0).sum(1), width)
        if known_batch.past:  # hide some contexts, so that an unknown one is trained too
            shown = rng.random(known.shape) >= objective.unknown
            past = {n: x * shown.reshape(shown.shape + (1,) * (x.ndim - 2)) for n, x in known_batch.past.items()}
            known_batch = known_batch._replace(past={n: x.astype(known_batch.past[n].dtype) for n, x in past.items()})
        mask = query >= 0
        context: dict[str, Any] = {}
        for name, table in data.context_features.items():  # mask query items of another context than the first
            query_context = table[np.maximum(query, 0)]
            context[name] = query_context[:, 0]
            if not following:
                mask &= (query_context == query_context[:, :1]).reshape(*query.shape, -1).all(-1)
        rows = np.where(mask, data.item[np.maximum(query, 0)], 0).astype(np.int32)
        task = RankingTask(known_batch._replace(context=context), Chosen(rows, mask.astype(np.float32)))
        yield task, int(fold[piece[0]])


def _draw_user(
    histories: Histories, positive: np.ndarray, u: int, objective: Ranking, most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the support and the query of one user, as positions of interactions."""
    span = slice(histories.starts[u], histories.starts[u + 1])
    index, liked = histories.index[span], positive[span]
    if not histories.ordered:
        order = rng.permutation(len(index))
        index, liked = index[order], liked[order]
    else:  # latest first: the query comes before the support
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


def _next_items(
    histories: Histories, positive: np.ndarray, u: int, objective: Ranking, most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return support and next-item query of one user, as positions of interactions; -1 where no positive is next.

    The support holds the latest `most` interactions before the last positive.
    """
    span = slice(histories.starts[u], histories.starts[u + 1])
    index, liked = histories.index[span][::-1], positive[span][::-1]
    if rng.random() >= objective.dislikes:
        index, liked = index[liked], liked[liked]
    latest = slice(max(0, np.flatnonzero(liked)[-1] - most), np.flatnonzero(liked)[-1] + 1)
    index, liked = index[latest], liked[latest]
    return index[:-1], np.where(liked, index, -1)


def _padded(rows: Any, size: int, width: int) -> np.ndarray:
    """Pad rows to `[size, width]` with -1."""
    padded = np.full((size, width), -1, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row[:width]
    return padded
