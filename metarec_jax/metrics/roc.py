"""Area under the ROC curve, over all interactions and within users.

Ties count one half; a NaN score ranks last. `scores`, `target` and `mask` are `[users, candidates]`; the mask is 0 for
padding.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core.outer import pieces

NARROW = 512  # candidates up to which pairwise comparison is faster than sorting
BLOCK = 128  # users compared at a time, to fit a CPU's cache


def auc(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the area under the ROC curve over the pooled interactions of all users.

    On a CPU outside `jit`, numpy sorts, which is much faster than XLA there.

    Example:
      >>> float(mr.metrics.auc(jnp.array([[3.0, 2.0], [1.0, 0.0]]), jnp.array([[1, 0], [1, 0]]), jnp.ones((2, 2))))
      0.75
    """
    if jax.default_backend() == "cpu" and not any(isinstance(x, jax.core.Tracer) for x in (scores, target, mask)):
        return jnp.float32(_host_auc(*(np.asarray(x).ravel() for x in (scores, target, mask))))
    return _auc(*(jnp.ravel(x) for x in (scores, target, mask)))


def within_user_auc(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the area under each user's own ROC curve, `[users]`; NaN for users with one class only.

    Example:
      >>> mr.metrics.within_user_auc(jnp.array([[3.0, 2.0], [0.0, 1.0]]), jnp.array([[1, 0], [1, 0]]), jnp.ones((2, 2)))
      Array([1., 0.], dtype=float32)
    """
    each = _row_auc if jnp.shape(scores)[1] <= NARROW else jax.vmap(_auc)
    return each(scores, target, mask)


def _no_nan(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def _auc(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute AUC as the Mann-Whitney statistic: the share of correctly ordered pairs, with ties as one half.

    After sorting, a positive wins against the negatives before its tie group and half of those within it.
    """
    kept = jnp.asarray(mask) > 0
    positive = kept & (jnp.asarray(target) > 0.5)
    negative = kept & ~positive
    key, order = jax.lax.sort_key_val(jnp.where(kept, _no_nan(scores), jnp.inf), jnp.arange(len(kept)))
    up, down = (side[order].astype(jnp.int32) for side in (positive, negative))
    before = jnp.cumsum(down)  # negatives so far
    first = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])  # of a tie group
    start = jax.lax.cummax(jnp.where(first, before - down, 0))
    end = jax.lax.cummin(jnp.where(jnp.append(first[1:], True), before, before[-1]), reverse=True)
    p, n = positive.sum(), negative.sum()
    wins = jnp.where(up > 0, (start + end) / 2 / jnp.maximum(n, 1), 0.0).sum() / jnp.maximum(p, 1)
    return jnp.where((p > 0) & (n > 0), wins, jnp.nan)


def _host_auc(scores: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Compute `_auc` in numpy, whose sorting and searching releases the GIL."""
    with ThreadPoolExecutor() as threads:

        def classes(part: slice) -> tuple[np.ndarray, np.ndarray]:
            key, kept, positive = scores[part], mask[part] > 0, target[part] > 0.5
            if len(key) and np.isnan(key.min()):
                key = np.where(np.isnan(key), -np.inf, key)
            return key[kept & positive], key[kept & ~positive]

        def wins(part: slice) -> float:
            """Count twice the pairs that a chunk of sorted positives wins, and ties once."""
            positives = up[part]
            low, high = np.searchsorted(down, positives[0], "left"), np.searchsorted(down, positives[-1], "right")
            near = down[low:high]
            below, at_most = (np.searchsorted(near, positives, side).sum(dtype=float) for side in ("left", "right"))
            return 2.0 * low * len(positives) + below + at_most

        def chunks(length: int, size: int) -> list[slice]:
            return [slice(i, min(i + size, length)) for i in range(0, length, size)]

        sides = zip(*threads.map(classes, chunks(len(scores), 1 << 22)), strict=True)
        up, down = threads.map(lambda parts: np.sort(np.concatenate(parts)), sides)
        if not len(up) or not len(down):
            return float("nan")
        return sum(threads.map(wins, chunks(len(up), 1 << 14))) / 2 / len(up) / len(down)


@jax.jit
def _row_auc(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute `_auc` of each row of a narrow table by pairwise comparison, without sorting."""

    def block(rows: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        scores, target, mask = (x.T for x in rows)  # [candidates, users]
        positive = (mask > 0) & (target > 0.5)
        negative = (mask > 0) & ~positive

        def compare(j: int, wins: jax.Array) -> jax.Array:
            return wins + jnp.where(negative[j], (scores > scores[j]) + 0.5 * (scores == scores[j]), 0.0)

        wins = jax.lax.fori_loop(0, scores.shape[0], compare, jnp.zeros(scores.shape))
        p, n = positive.sum(0), negative.sum(0)
        value = jnp.where(positive, wins, 0.0).sum(0) / jnp.maximum(p * n, 1)
        return jnp.where((p > 0) & (n > 0), value, jnp.nan)

    rows = (_no_nan(jnp.asarray(scores)), jnp.asarray(target), jnp.asarray(mask))
    size = min(len(rows[0]), BLOCK if jax.default_backend() == "cpu" else 1 << 16)
    return jax.lax.map(block, pieces(rows, size)).reshape(-1)[: len(rows[0])] if size else jnp.zeros(0)
