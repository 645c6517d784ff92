"""Metrics of recommended lists: coverage, novelty, diversity and personalisation.

Lists are `[users, k]` item rows; -1 is an empty place, in lists shorter than k. An undefined metric is NaN.
"""

import jax
import jax.numpy as jnp

from metarec_jax.core.outer import pieces

BLOCK = 128  # users compared with all others at a time


def coverage(lists: jax.Array, items: int) -> jax.Array:
    """Compute catalogue coverage: the share of items recommended to anyone (Ge et al., RecSys 2010).

    Args:
      lists: item rows `[users, k]`, -1 for none.
      items: number of item rows.

    Example:
      >>> float(mr.metrics.lists.coverage(jnp.array([[0, 1], [0, 1]]), items=8))
      0.25
    """
    return (_counts(lists, items) > 0).mean()


def gini(lists: jax.Array, items: int) -> jax.Array:
    """Compute the Gini index of how often each item is recommended.

    0 if all items are recommended equally often, near 1 if few dominate.

    Args:
      lists: item rows `[users, k]`, -1 for none.
      items: number of item rows.

    Example:
      >>> even, uneven = jnp.array([[0, 1], [2, 3]]), jnp.array([[0, -1], [0, -1]])
      >>> float(mr.metrics.lists.gini(even, items=4)), float(mr.metrics.lists.gini(uneven, items=4))
      (0.0, 0.75)
    """
    count = jnp.sort(_counts(lists, items))
    rank = 1.0 + jnp.arange(items)
    return ((2 * rank - items - 1) * count).sum() / (items * _or_nan(count.sum()))


def novelty(lists: jax.Array, popularity: jax.Array) -> jax.Array:
    """Compute the mean self-information of each list, -log2 p(item), in bits (Zhou et al., PNAS 2010).

    Args:
      lists: item rows `[users, k]`, -1 for none.
      popularity: `[items]` share of the training users who know an item. An unknown item gets half of the smallest
        positive share.

    Returns:
      `[users]`; NaN for an empty list.

    Example:
      >>> mr.metrics.lists.novelty(jnp.array([[0, 1], [2, 2]]), popularity=jnp.array([0.5, 0.125, 0.25]))
      Array([2., 2.], dtype=float32)
    """
    least = jnp.where(popularity > 0, popularity, jnp.inf).min() / 2
    bits = -jnp.log2(jnp.maximum(popularity, least))
    return _mean(bits, lists)


def popularity_rank(lists: jax.Array, popularity: jax.Array) -> jax.Array:
    """Compute the mean popularity rank of each list's items, `[users]`; NaN for an empty list.

    Args:
      lists: item rows `[users, k]`, -1 for none.
      popularity: `[items]`, any increasing measure. The most popular item has rank 1; ties share their mean rank.

    Example:
      >>> mr.metrics.lists.popularity_rank(jnp.array([[0, 1], [2, -1]]), popularity=jnp.array([9.0, 5.0, 7.0]))
      Array([2., 2.], dtype=float32)
    """
    return _mean(len(popularity) + 1 - jax.scipy.stats.rankdata(popularity), lists)


def diversity(lists: jax.Array, vectors: jax.Array) -> jax.Array:
    """Compute intra-list diversity: the mean cosine distance between two items of a list.

    Args:
      lists: item rows `[users, k]`, -1 for none.
      vectors: `[items, width]` embeddings or features. A zero vector has distance 1 to all others.

    Returns:
      `[users]`; NaN for lists with fewer than two items.

    Example:
      >>> vectors = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
      >>> mr.metrics.lists.diversity(jnp.array([[0, 1], [0, 2]]), vectors)
      Array([1., 0.], dtype=float32)

    References:
      Ziegler et al., WWW 2005.
    """
    kept = (lists >= 0).astype(vectors.dtype)
    norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = jnp.where(norm > 0, vectors / jnp.where(norm > 0, norm, 1.0), 0.0)[lists] * kept[..., None]
    similarity = jnp.square(unit.sum(1)).sum(-1) - jnp.square(unit).sum((1, 2))  # sum over ordered pairs
    count = kept.sum(1)
    return 1 - similarity / _or_nan(count * (count - 1))


@jax.jit
def likeness(lists: jax.Array) -> jax.Array:
    """Compute the mean Jaccard index, |A ∩ B| / |A ∪ B|, of two users' lists, over all pairs of users.

    Pairs of empty lists are skipped; NaN if no pair remains. Duplicate items of a list count once.

    Args:
      lists: item rows `[users, k]`, -1 for none.

    Example:
      >>> round(float(mr.metrics.lists.likeness(jnp.array([[0, 1], [1, 2]]))), 4)  # 1 shared item of 3
      0.3333
    """
    lists = jnp.sort(jnp.asarray(lists), axis=1)
    users, _ = lists.shape
    kept = (lists >= 0) & jnp.pad(lists[:, 1:] != lists[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    size = kept.sum(1)
    distinct = jnp.unique(lists, return_inverse=True, size=lists.size)[1].reshape(lists.shape)
    row = jnp.where(kept, distinct, lists.size)  # items renumbered 0, 1, ...; the last is for empty places

    def block(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block_rows, block_size, user = part
        holds = (
            jnp.zeros((lists.size + 1, len(block_rows)), jnp.int8)
            .at[block_rows, jnp.arange(len(block_rows))[:, None]]
            .set(1)
        )
        holds = holds.at[-1].set(0)  # [items, block] whether a list of the block holds an item
        shared = jax.lax.fori_loop(
            0, row.shape[1], lambda j, n: n + holds[row[:, j]], jnp.zeros((users, len(block_rows)), int)
        )
        union = size[:, None] + block_size - shared
        pair = (union > 0) & (jnp.arange(users)[:, None] < user)  # each pair once; padding users are user 0
        return jnp.where(pair, shared / jnp.maximum(union, 1), 0.0).sum(0), pair.sum(0)

    index, count = jax.lax.map(block, pieces((row, size, jnp.arange(users)), min(users, BLOCK)))
    return index.sum() / _or_nan(count.sum())


def _mean(values: jax.Array, lists: jax.Array) -> jax.Array:
    """Average `values` `[items]` over each list, `[users]`; NaN for an empty list."""
    kept = lists >= 0
    return jnp.where(kept, values[lists], 0.0).sum(1) / _or_nan(kept.sum(1))


def _counts(lists: jax.Array, items: int) -> jax.Array:
    return jnp.bincount(jnp.where(lists >= 0, lists, items).ravel(), length=items + 1)[:items]


def _or_nan(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.nan)
