"""Batching: ragged histories to `Task` arrays of a few fixed padded shapes, to avoid recompilation."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.schema import CONTEXT, ITEM, ITEM_ID, ORDER, STATISTICS, USER
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target
from metarec_jax.types import Examples, Task


class Batch(NamedTuple):
    """A task batch of numpy arrays, and its users' positions in `Histories` (without padding users).

    Example:
      >>> plays = {"user_id": [1, 1, 2, 2, 2], "item_id": [7, 8, 7, 8, 9], "rating": [5, 1, 4, 2, 3]}
      >>> data = mr.data.from_tables(plays)
      >>> histories = mr.tasks.Histories.of(data, np.array([1, 2]))
      >>> (batch,) = mr.tasks.batches(histories, mr.tasks.Target("click"), query=1, batch_size=2, buckets=(4,))
      >>> batch.positions, batch.task.support.mask
      (array([0, 1]), array([[1., 0., 0., 0.],
             [1., 1., 0., 0.]], dtype=float32))
    """

    task: Task
    positions: np.ndarray


def features(
    data: Dataset, users: np.ndarray, items: np.ndarray, index: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Gather the features that models read.

    Args:
      data: the dataset.
      users: `[users]` user rows.
      items: `[users, examples]` item rows.
      index: `[users, examples]` positions of the interactions, whose contexts are read; -1 for an unknown context
        (default: all unknown).

    Returns:
      `item_id` `[users, examples]` int32, and one entry `item/NAME`, `user/NAME` or `context/NAME` for each field,
      `[users, examples, ...]`. Batches add `order` `[users, examples]`, the number of the user's earlier interactions.

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> gathered = mr.tasks.features(data, users=np.array([1, 2]), items=np.array([[1, 2, 3], [4, 5, 6]]))
      >>> {name: array.shape for name, array in gathered.items()}
      {'item_id': (2, 3), 'item/genre': (2, 3)}
    """
    gathered = {ITEM_ID: items.astype(np.int32)}
    for name, table in data.item_features.items():
        gathered[ITEM + name] = table[items]
    for name, table in data.user_features.items():
        row = table[users][:, None]
        gathered[USER + name] = np.broadcast_to(row, items.shape + row.shape[2:])
    for field in data.context_fields:
        context = np.broadcast_to(field.unknown(), items.shape + field.unknown().shape)
        if index is not None:
            known = (index >= 0).reshape(index.shape + (1,) * (context.ndim - index.ndim))
            context = np.where(known, data.context_features[field.name][np.maximum(index, 0)], context)
        gathered[CONTEXT + field.name] = context
    return gathered


def bucket_sizes(lengths: np.ndarray, count: int = 4, multiple: int = 8) -> tuple[int, ...]:
    """Choose at most `count` padded lengths, multiples of `multiple`, that minimise padding.

    Exact dynamic programming over the distinct rounded lengths.

    Args:
      lengths: `[n]` lengths to be padded.
      count: largest number of padded lengths.
      multiple: every padded length is a multiple of this.

    Example:
      >>> mr.tasks.bucket_sizes(np.array([3, 5, 8, 30, 31]), count=2)
      (8, 32)
    """
    rounded = -(-np.maximum(np.asarray(lengths), 1) // multiple) * multiple
    sizes, weights = np.unique(rounded, return_counts=True)
    total = np.concatenate([[0], np.cumsum(weights)])
    cost = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)
    back = []
    for _ in range(min(count, len(sizes))):
        # cost'[j] = min_i cost[i] + sizes[j - 1] * (users between i and j)
        options = cost[:, None] + np.concatenate([[0], sizes]) * (total[None] - total[:, None])
        options = np.where(np.arange(len(cost))[:, None] < np.arange(len(cost)), options, np.inf)
        back.append(options.argmin(0))
        cost = options.min(0)
    chosen, end = [], len(sizes)
    for step in reversed(back):
        chosen.append(int(sizes[end - 1]))
        end = step[end]
    return tuple(reversed(chosen))


def batches(
    histories: Histories,
    target: Target,
    *,
    query: int = 10,
    support: int | None = None,
    batch_size: int = 64,
    buckets: tuple[int, ...],
    rng: np.random.Generator | None = None,
    unknown: float = 0.0,
    short: float = 0.0,
    noise: float = 0.0,
    statistics: ItemStatistics | None = None,
) -> Iterator[Batch]:
    """Yield all users once, in task batches of `batch_size` users; each support width is one of `buckets`.

    The last batch of a bucket is padded with users whose masks are 0. A user with no more than `query` interactions
    keeps at least one for the support; supports longer than the largest bucket are cut.

    Args:
      histories: the users.
      target: mapping of ratings to targets.
      query: largest query size, and padded width of the query.
      support: largest support size (None: all remaining interactions).
      batch_size: users a batch.
      buckets: padded support widths, ascending.
      rng: shuffle users and interactions; without it the order of `histories` is kept. The interactions of ordered
        histories stay in order; each task then ends at a random time of its user's.
      unknown: probability with which the identity of a user, the identity of an item, and the context of an interaction
        are each hidden, to train the embeddings of unknown values.
      short: share of users whose support set is cut to a log-uniform random length, from 1 to all.
      noise: share of support ratings replaced by random ones, uniform over the distinct ratings of the data; needs
        `rng`.
      statistics: exclude each user's own interactions from the field `training statistics`; for training users only.

    Example:
      >>> train = mr.ColdUsers().split(mr.data.synthetic(users=30, items=40)).train
      >>> batches = mr.tasks.batches(train, mr.tasks.Target("rating"), query=10, batch_size=16, buckets=(16, 32))
      >>> for task, positions in batches:
      ...     print(task.support.mask.shape, task.query.mask.shape, len(positions))
      (16, 16) (16, 10) 8
      (16, 32) (16, 10) 16
    """
    order, skip = np.arange(len(histories)), np.zeros(len(histories), int)
    if rng is not None:
        order = rng.permutation(order)
        if histories.ordered:  # skip interactions after a random time
            skip = rng.integers(np.maximum(histories.lengths - query, 1))
        else:
            histories = histories.shuffled(rng)
    length = histories.lengths - skip
    queries = np.minimum(query, np.maximum(length - 1, 0))
    supports = np.minimum(length - queries, buckets[-1] if support is None else min(support, buckets[-1]))
    if rng is not None and short:
        cut = np.exp(rng.random(len(supports)) * np.log(supports + 1)).astype(int)
        supports = np.where(rng.random(len(supports)) < short, np.minimum(cut, supports), supports)
    bucket = np.searchsorted(buckets, supports[order])
    pieces = [
        order[bucket == b][i : i + batch_size]
        for b in range(len(buckets))
        for i in range(0, int((bucket == b).sum()), batch_size)
    ]
    if rng is not None:
        pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    levels = target.grade(np.unique(histories.data.rating))
    for piece in pieces:
        width = buckets[int(np.searchsorted(buckets, supports[piece].max()))]
        begin = histories.starts[piece] + skip[piece]
        user = histories.users[piece]
        if rng is not None and unknown:
            user = np.where(rng.random(len(user)) < unknown, UNKNOWN, user)
        shared = (rng, unknown, statistics)
        task = Task(
            _examples(histories, target, user, begin + queries[piece], supports[piece], width, *shared, support=True),
            _examples(histories, target, user, begin, queries[piece], query, *shared),
        )
        if rng is not None and noise:
            task = task._replace(support=_replaced(task.support, noise, levels, rng))
        yield Batch(pad_users(task, batch_size), piece)


def _replaced(examples: Examples, share: float, levels: np.ndarray, rng: np.random.Generator) -> Examples:
    """Replace a `share` of the targets by random ones from `levels`."""
    target: Any = np.asarray(examples.target)
    mask = np.asarray(examples.mask)
    replaced = (rng.random(target.shape) < share) & (mask > 0)
    return examples._replace(target=np.where(replaced, rng.choice(levels, target.shape), target).astype(target.dtype))


def pad_users(task: Task, size: int) -> Task:
    """Pad a task batch to `size` users with zeros, whose masks are 0.

    Args:
      task: arrays `[users, ...]`.
      size: number of users of the result.
    """

    def pad(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)]) if len(x) < size else x

    return jax.tree.map(pad, task)


def _examples(
    histories: Histories,
    target: Target,
    users: np.ndarray,
    begin: np.ndarray,
    count: np.ndarray,
    width: int,
    rng: np.random.Generator | None,
    unknown: float,
    statistics: ItemStatistics | None,
    support: bool = False,
) -> Examples:
    """Return examples `[users, width]` of the interactions `begin[i] : begin[i] + count[i]` of each user."""
    data, column = histories.data, np.arange(width)
    mask = column < count[:, None]
    index = histories.index[np.where(mask, begin[:, None] + column, 0)]
    item = np.where(mask, data.item[index], UNKNOWN)
    context_index = np.where(mask, index, -1)
    if rng is not None and unknown and data.context_fields:
        context_index = np.where(rng.random(item.shape) < unknown, -1, context_index)
    gathered = features(data, users, item, context_index)
    gathered[ORDER] = np.where(mask, data.order[index], 0)
    if rng is not None and unknown:
        gathered[ITEM_ID] = np.where(rng.random(item.shape) < unknown, UNKNOWN, gathered[ITEM_ID])
    rating = data.rating[index]
    values: Any = np.where(mask, target.grade(rating) if support else target.encode(rating), 0).astype(np.float32)
    weight: Any = mask.astype(np.float32)  # `Any`: a numpy array in a field typed for JAX arrays
    if statistics is not None:
        gathered[ITEM + STATISTICS] = statistics.without(data.user[index], item, rating)
    return Examples(gathered, values, weight)
