"""Sampler: an infinite Grain dataset of training tasks: deterministic, seekable and sharded."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_jax.tasks.batching import Batch, batches, bucket_sizes
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

if TYPE_CHECKING:
    import grain


def sampler(
    histories: Histories,
    target: Target,
    *,
    query: int = 10,
    batch_size: int = 64,
    max_support: int = 128,
    buckets: int | tuple[int, ...] = 6,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    **options: Any,
) -> "grain.MapDataset":
    """Build an infinite Grain dataset of task batches, for your own training loop.

    Batch i is `sampler[i]`, a pure function of the arguments and i. The users of a batch have similar history lengths;
    every batch is full. Within a bucket, each epoch shuffles the users and draws new support and query sets.

        loop = iter(sampler.to_iter_dataset())
        batch = next(loop)
        loop.get_state(), loop.set_state(state)  # JSON values: save them with the parameters

    Args:
      histories: the users.
      target: mapping of ratings to targets.
      query: largest query size.
      batch_size: users a batch.
      max_support: largest support size; longer histories are subsampled anew each time.
      buckets: number of padded support widths, chosen to minimise padding; or the widths themselves.
      seed: seed of order and draws.
      shard: index of this process and number of processes; their users are disjoint. Batch i has the same shapes in all
        of them, so that `jax.make_array_from_process_local_data` makes a global batch of theirs.
      **options: `unknown`, `short`, `noise` and `statistics` of `batches`.

    Returns:
      A dataset of `Batch`; `positions` refer to `histories`.

    Raises:
      ModuleNotFoundError: Grain is not installed.
      ValueError: the shard does not exist, or there are fewer users than shards.

    Example:
      >>> train = mr.ColdUsers().split(mr.data.synthetic(users=30, items=40)).train
      >>> batches = mr.tasks.sampler(train, mr.tasks.Target("rating"), batch_size=8, buckets=1)
      >>> batches[1000].task.query.mask.shape
      (8, 10)
      >>> bool((batches[1000].positions == batches[1000].positions).all())  # a function of the number
      True
    """
    try:
        import grain
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the sampler needs Grain: pip install 'metarec-jax[grain]'") from error
    number, count = shard
    if not 0 <= number < count or len(histories) < count:
        raise ValueError(f"shard {number} of {count} does not exist, or {len(histories)} users are too few")
    supports = np.clip(histories.lengths - query, 1, max_support)
    widths = _shared_widths(supports, bucket_sizes(supports, buckets) if isinstance(buckets, int) else buckets, count)
    bucket = np.minimum(np.searchsorted(widths, supports), len(widths) - 1)
    parts, weights = [], []
    for b, width in enumerate(widths):
        everyone = np.flatnonzero(bucket == b)
        users = everyone[number::count]
        build = partial(_batch, histories, target, query=query, batch_size=batch_size, buckets=(width,), **options)
        part = grain.MapDataset.source(users).seed(seed + b).shuffle().repeat().batch(batch_size, batch_fn=np.array)
        parts.append(part.random_map(build))
        weights.append(float(len(everyone)))  # the same for all shards
    return grain.MapDataset.mix(parts, weights)


def _shared_widths(supports: np.ndarray, widths: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """Remove padded widths until each has users for every shard; users move to the next width, or from the one before.

    There must be as many users as shards.
    """
    kept = list(widths)
    while len(kept) > 1:
        bucket = np.minimum(np.searchsorted(kept, supports), len(kept) - 1)
        count = np.bincount(bucket, minlength=len(kept))
        if count.min() >= shards:
            break
        few = int(np.argmax(count < shards))
        del kept[few - 1 if few == len(kept) - 1 else few]
    return tuple(kept)


def _batch(histories: Histories, target: Target, users: np.ndarray, rng: np.random.Generator, **options: Any) -> Batch:
    """Build the batch of the users at these positions, in random order."""
    (batch,) = batches(histories.take(users), target, rng=rng, **options)
    return batch._replace(positions=users[batch.positions])
