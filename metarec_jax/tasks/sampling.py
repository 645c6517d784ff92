"""Sampler: training tasks without end by Grain: deterministic, seekable, sharded, its position part of a checkpoint."""

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
    """Task batches as a Grain dataset without end, for a training loop of your own.

    Batch number i is `sampler[i]`: a function of the arguments and i alone. Users of similar history length share a
    batch; each batch is full. Within a bucket users are shuffled anew in each round, and support and query sets are
    drawn anew each time.

        loop = iter(sampler.to_iter_dataset())
        batch = next(loop)
        loop.get_state(), loop.set_state(state)  # plain JSON values: write them beside the parameters

    Args:
      histories: the users.
      target: ratings to targets.
      query: largest query size.
      batch_size: users a batch.
      max_support: longest support set; longer histories are sampled anew each time.
      buckets: number of padded support widths, chosen to waste the least; or the widths themselves.
      seed: of order and draws.
      shard: this process's number and how many there are; each sees users of its own.
      **options: of `batches`: `unknown`, `short`, `noise`, `statistics`.

    Returns:
      A dataset of `Batch`, whose positions are those in `histories`.

    Raises:
      ModuleNotFoundError: Grain is not installed.
      ValueError: a shard that does not exist, or one without users.
    """
    try:
        import grain
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the sampler needs Grain: pip install 'metarec-jax[grain]'") from error
    number, count = shard
    if not 0 <= number < count or len(histories) <= number:
        raise ValueError(f"shard {number} of {count} does not exist or has none of the {len(histories)} users")
    own = np.arange(len(histories))[number::count]
    supports = np.clip(histories.lengths[own] - query, 1, max_support)
    widths = bucket_sizes(supports, buckets) if isinstance(buckets, int) else tuple(buckets)
    bucket = np.minimum(np.searchsorted(widths, supports), len(widths) - 1)
    parts, weights = [], []
    for b, width in enumerate(widths):
        if not len(users := own[bucket == b]):
            continue
        build = partial(_batch, histories, target, query=query, batch_size=batch_size, buckets=(width,), **options)
        part = grain.MapDataset.source(users).seed(seed + b).shuffle().repeat().batch(batch_size, batch_fn=np.array)
        parts.append(part.random_map(build))
        weights.append(float(len(users)))
    return grain.MapDataset.mix(parts, weights)


def _batch(histories: Histories, target: Target, users: np.ndarray, rng: np.random.Generator, **options: Any) -> Batch:
    """The one batch of these positions, in random order."""
    (batch,) = batches(histories.take(users), target, rng=rng, **options)
    return batch._replace(positions=users[batch.positions])
