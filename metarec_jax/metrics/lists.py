"""Metrics of recommended lists `[users, k]` of item rows: how much of the catalogue, how new, diverse and personal.

Row -1 is an empty place: lists shorter than k. A metric that is not defined is NaN.
"""

import jax
import jax.numpy as jnp

from metarec_jax.core.outer import pieces

BLOCK = 128  # users whose lists are compared with all others at a time


def coverage(lists: jax.Array, items: int) -> jax.Array:
    """Share of a catalogue of `items` rows that is recommended to anyone (Ge et al., RecSys 2010)."""
    return (_counts(lists, items) > 0).mean()


def gini(lists: jax.Array, items: int) -> jax.Array:
    """Gini index of how often each of `items` rows is recommended: 0 all alike, towards 1 a few items only."""
    count = jnp.sort(_counts(lists, items))
    rank = 1.0 + jnp.arange(items)
    return ((2 * rank - items - 1) * count).sum() / (items * _or_nan(count.sum()))


def novelty(lists: jax.Array, popularity: jax.Array) -> jax.Array:
    """`[users]` mean self-information of a list, -log2 p(item) in bits (Zhou et al., PNAS 2010).

    Args:
      lists: item rows `[users, k]`, -1 for none.
      popularity: `[items]` share of the training users who know an item. One that nobody knows counts as if half a user
        of the smallest share did.
    """
    least = jnp.where(popularity > 0, popularity, jnp.inf).min() / 2
    bits = -jnp.log2(jnp.maximum(popularity, least))
    return _mean(bits, lists)


def popularity_rank(lists: jax.Array, popularity: jax.Array) -> jax.Array:
    """`[users]` mean popularity rank of a list's items; NaN for an empty list.

    Args:
      lists: item rows `[users, k]`, -1 for none.
      popularity: `[items]`, any number that grows with it. The largest has rank 1; equal ones share their mean rank.
    """
    return _mean(len(popularity) + 1 - jax.scipy.stats.rankdata(popularity), lists)


def diversity(lists: jax.Array, vectors: jax.Array) -> jax.Array:
    """`[users]` mean cosine distance between two items of a list (Ziegler et al., WWW 2005); NaN with fewer than two.

    Args:
      lists: item rows `[users, k]`, -1 for none.
      vectors: `[items, width]`, embeddings or features. A vector of zeros is at distance 1 from every other.
    """
    kept = (lists >= 0).astype(vectors.dtype)
    norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = jnp.where(norm > 0, vectors / jnp.where(norm > 0, norm, 1.0), 0.0)[lists] * kept[..., None]
    alike = jnp.square(unit.sum(1)).sum(-1) - jnp.square(unit).sum((1, 2))  # of all ordered pairs of two
    count = kept.sum(1)
    return 1 - alike / _or_nan(count * (count - 1))


@jax.jit
def likeness(lists: jax.Array) -> jax.Array:
    """Mean Jaccard index, |A ∩ B| / |A ∪ B|, of the lists of two users, over all pairs of users.

    Pairs of two empty lists are left out; NaN where no pair is left. An item that a list holds twice counts once.

    Args:
      lists: item rows `[users, k]`, -1 for none.
    """
    lists = jnp.sort(jnp.asarray(lists), axis=1)
    users, _ = lists.shape
    kept = (lists >= 0) & jnp.pad(lists[:, 1:] != lists[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    size = kept.sum(1)
    distinct = jnp.unique(lists, return_inverse=True, size=lists.size)[1].reshape(lists.shape)
    row = jnp.where(kept, distinct, lists.size)  # 0, 1, ... of the items that occur; the last is for empty places

    def block(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, own_size, user = part
        holds = jnp.zeros((lists.size + 1, len(own)), jnp.int8).at[own, jnp.arange(len(own))[:, None]].set(1)
        holds = holds.at[-1].set(0)  # [items, block], whether each list of the block holds an item
        both = jax.lax.fori_loop(0, row.shape[1], lambda j, n: n + holds[row[:, j]], jnp.zeros((users, len(own)), int))
        either = size[:, None] + own_size - both
        pair = (either > 0) & (jnp.arange(users)[:, None] < user)  # each pair once; filling users are user 0
        return jnp.where(pair, both / jnp.maximum(either, 1), 0.0).sum(0), pair.sum(0)

    index, count = jax.lax.map(block, pieces((row, size, jnp.arange(users)), min(users, BLOCK)))
    return index.sum() / _or_nan(count.sum())


def _mean(values: jax.Array, lists: jax.Array) -> jax.Array:
    """`[users]` mean of the `values` `[items]` of a list's items; NaN for an empty list."""
    kept = lists >= 0
    return jnp.where(kept, values[lists], 0.0).sum(1) / _or_nan(kept.sum(1))


def _counts(lists: jax.Array, items: int) -> jax.Array:
    return jnp.bincount(jnp.where(lists >= 0, lists, items).ravel(), length=items + 1)[:items]


def _or_nan(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.nan)
