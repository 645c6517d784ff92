"""Metrics of recommended lists `[users, k]` of item rows: how much of the catalogue, how new, how diverse.

Row -1 is an empty place: lists shorter than k. A metric that is not defined is NaN.
"""

import jax
import jax.numpy as jnp


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
    kept = lists >= 0
    return jnp.where(kept, bits[lists], 0.0).sum(1) / _or_nan(kept.sum(1))


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


def _counts(lists: jax.Array, items: int) -> jax.Array:
    return jnp.bincount(jnp.where(lists >= 0, lists, items).ravel(), length=items + 1)[:items]


def _or_nan(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.nan)
