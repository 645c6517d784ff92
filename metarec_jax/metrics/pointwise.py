"""Metrics in JAX, batched over users: scores and targets `[users, candidates]` with a mask.

Ranking metrics sort a user's candidates by score; ties keep the order of the candidates. AUC counts a tie as one half.
A NaN score ranks last. An undefined metric, of a user or overall, is NaN; `mean_defined` skips such users.

In all functions `scores` or `probability`, `target` and `mask` are `[users, candidates]`; the mask is 0 for padding.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core.outer import pieces

NARROW = 512  # candidates up to which pairwise comparison is faster than sorting
BLOCK = 128  # users compared at a time, to fit a CPU's cache


def mean_defined(per_user: jax.Array) -> jax.Array:
    """Compute the mean over users whose value is not NaN; NaN if there is none.

    Example:
      >>> float(mr.metrics.mean_defined(jnp.array([1.0, jnp.nan, 0.5])))
      0.75
    """
    return jnp.nanmean(per_user)


def rmse(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the root mean squared error over all interactions, in units of the target.

    Example:
      >>> float(mr.metrics.rmse(jnp.array([[4.0, 1.0]]), jnp.array([[3.0, 8.0]]), jnp.ones((1, 2))))
      5.0
    """
    return jnp.sqrt(_mean(jnp.subtract(scores, target) ** 2, mask))


def mae(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the mean absolute error over all interactions, in units of the target."""
    return _mean(jnp.abs(jnp.subtract(scores, target)), mask)


def log_loss(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the mean negative log-likelihood (nats) of 0/1 targets.

    Probabilities are clipped to [1e-7, 1 - 1e-7].

    Example:
      >>> round(float(mr.metrics.log_loss(jnp.array([[0.5, 0.5]]), jnp.array([[1, 0]]), jnp.ones((1, 2)))), 4)
      0.6931
    """
    p = jnp.clip(probability, 1e-7, 1 - 1e-7)
    return _mean(-target * jnp.log(p) - (1 - target) * jnp.log1p(-p), mask)


def accuracy(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the share of interactions classified correctly at the cut-off 1/2.

    Example:
      >>> float(mr.metrics.accuracy(jnp.array([[0.9, 0.8, 0.1, 0.6]]), jnp.array([[1, 1, 0, 0]]), jnp.ones((1, 4))))
      0.75
    """
    return _mean((probability >= 0.5) == (target > 0.5), mask)


def precision(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the share of positives among interactions with `probability >= 1/2`; NaN if there is none.

    Example:
      >>> float(mr.metrics.precision(jnp.array([[0.9, 0.8, 0.4]]), jnp.array([[1, 0, 1]]), jnp.ones((1, 3))))
      0.5
    """
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return (guess & true).sum() / _or_nan(guess.sum())


def recall(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the share of positives that have `probability >= 1/2`; NaN if there are no positives."""
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return (guess & true).sum() / _or_nan(true.sum())


def f1(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the harmonic mean of precision and recall at `probability >= 1/2`; 0 if both are."""
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return 2 * (guess & true).sum() / jnp.maximum(guess.sum() + true.sum(), 1)


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


def precision_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute P@k, `[users]`: the number of positives in the top k, divided by k.

    The denominator is k also for users with fewer candidates.

    Example:
      >>> mr.metrics.precision_at(2, jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[1, 0, 1]]), jnp.ones((1, 3)))
      Array([0.5], dtype=float32)
    """
    return _defined(_top(k, scores, target, mask).sum(1) / k, mask)


def recall_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array, normalised: bool = False) -> jax.Array:
    """Compute R@k, `[users]`: the share of positives in the top k; NaN for users without positives.

    With `normalised` the denominator is min(k, positives), so that the best possible list has 1: Recall@R of Liang et
    al. (WWW 2018, section 4).

    Example:
      >>> mr.metrics.recall_at(2, jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[1, 0, 1]]), jnp.ones((1, 3)))
      Array([0.5], dtype=float32)
    """
    positives = _kept(target, mask).sum(1)
    return _top(k, scores, target, mask).sum(1) / _or_nan(jnp.minimum(k, positives) if normalised else positives)


def f1_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the harmonic mean of P@k and R@k, `[users]`; NaN for users without positives."""
    return 2 * _top(k, scores, target, mask).sum(1) / (k + _or_nan(_kept(target, mask).sum(1)))


def hit_rate_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the hit rate, `[users]`: 1 if a positive is in the top k, else 0.

    NaN for users without positives.

    Example:
      >>> mr.metrics.hit_rate_at(2, jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[0, 1, 1]]), jnp.ones((1, 3))).tolist()
      [1.0]
    """
    hit = (_top(k, scores, target, mask) > 0).any(1)
    return jnp.where((_kept(target, mask) > 0).any(1), hit, jnp.nan)


def map_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute average precision at k, `[users]`; NaN for users without positives.

    The mean over a user's positives of the precision at the rank of each in the top k, 0 for the others (as in
    trec_eval).

    Example:
      >>> mr.metrics.map_at(4, jnp.array([[4.0, 3.0, 2.0, 1.0]]), jnp.array([[1, 0, 0, 1]]), jnp.ones((1, 4)))
      Array([0.75], dtype=float32)
    """
    top = _top(k, scores, target, mask)
    at_rank = jnp.cumsum(top, 1) / (1.0 + jnp.arange(top.shape[1]))
    return (top * at_rank).sum(1) / _or_nan(_kept(target, mask).sum(1))


def ndcg_at(
    k: int, scores: jax.Array, target: jax.Array, mask: jax.Array, gain: Literal["linear", "exponential"] = "linear"
) -> jax.Array:
    """Compute nDCG@k, `[users]`: discounted cumulative gain over the ideal one.

    NaN for users without gain. The discount is 1 / log2(1 + rank). The gain is the target ("linear"; Järvelin and
    Kekäläinen, 2002) or 2^target - 1 ("exponential"; Burges et al., 2005). For clicks both equal nDCG@R of Liang et al.
    (WWW 2018, section 4): the ideal list has min(k, positives) positives at the top.

    Example:
      >>> ndcg = mr.metrics.ndcg_at(3, jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[0, 1, 0]]), jnp.ones((1, 3)))
      >>> round(float(ndcg[0]), 4)  # 1 / log2(1 + 2)
      0.6309
    """
    gains = target if gain == "linear" else jnp.exp2(jnp.asarray(target, jnp.float32)) - 1
    gained = _kept(gains, mask)
    top, ideal = _top(k, scores, gained, mask), jax.lax.top_k(gained, min(k, gained.shape[1]))[0]
    discount = 1 / jnp.log2(2.0 + jnp.arange(top.shape[1]))
    return (top * discount).sum(1) / _or_nan((ideal * discount).sum(1))


def mrr_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the reciprocal rank of the first positive, `[users]`; 0 outside the top k.

    NaN for users without positives.

    Example:
      >>> mr.metrics.mrr_at(3, jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[0, 1, 1]]), jnp.ones((1, 3))).tolist()
      [0.5]
    """
    hit = _top(k, scores, target, mask) > 0
    value = jnp.where(hit.any(1), 1 / (1.0 + hit.argmax(1)), 0.0)
    return jnp.where((_kept(target, mask) > 0).any(1), value, jnp.nan)


def reliability(
    probability: jax.Array, target: jax.Array, mask: jax.Array, bins: int = 10
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the reliability curve over `bins` equal parts of [0, 1]; the last part includes 1.

    Returns:
      Mean probability, share of positives and count, each `[bins]`; the first two are NaN for empty bins.

    Example:
      >>> mr.metrics.reliability(jnp.array([[0.25, 0.75, 0.75]]), jnp.array([[0, 1, 0]]), jnp.ones((1, 3)), bins=2)
      (Array([0.25, 0.75], dtype=float32), Array([0. , 0.5], dtype=float32), Array([1., 2.], dtype=float32))
    """
    kept = jnp.asarray(mask).ravel() > 0
    p = jnp.where(kept, jnp.asarray(probability).ravel(), 0.0)
    bin_of = jnp.where(kept, jnp.clip((p * bins).astype(int), 0, bins - 1), bins)  # an extra bin for padding
    positive = kept & (jnp.asarray(target).ravel() > 0.5)
    weights = (kept.astype(p.dtype), p, positive.astype(p.dtype))
    count, total, hits = (jnp.bincount(bin_of, w, length=bins + 1)[:bins] for w in weights)
    return total / _or_nan(count), hits / _or_nan(count), count


def calibration_error(probability: jax.Array, target: jax.Array, mask: jax.Array, bins: int = 10) -> jax.Array:
    """Compute the expected calibration error (Naeini et al., AAAI 2015).

    |mean probability - share of positives|, averaged over bins by their counts.

    Example:
      >>> float(mr.metrics.calibration_error(jnp.array([[0.75, 0.75]]), jnp.array([[1, 0]]), jnp.ones((1, 2))))
      0.25
    """
    confidence, share, count = reliability(probability, target, mask, bins)
    return jnp.where(count > 0, jnp.abs(confidence - share) * count, 0.0).sum() / _or_nan(count.sum())


def click_metrics(scores: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Compute the click metrics of probabilities.

    AUC, within-user AUC, P@5, R@5, nDCG@5, MRR@5, MAP@5, log-loss, calibration error, accuracy and F1.

    Example:
      >>> table = mr.metrics.click_metrics(jnp.array([[0.9, 0.2, 0.6]]), jnp.array([[1, 0, 0]]), jnp.ones((1, 3)))
      >>> float(table["auc"]), float(table["mrr@5"])
      (1.0, 1.0)
    """
    return {"auc": auc(scores, target, mask)} | _click_metrics(scores, target, mask)


@jax.jit
def _click_metrics(scores: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    return {
        "within_user_auc": mean_defined(within_user_auc(scores, target, mask)),
        "precision@5": mean_defined(precision_at(5, scores, target, mask)),
        "recall@5": mean_defined(recall_at(5, scores, target, mask)),
        "ndcg@5": mean_defined(ndcg_at(5, scores, target, mask)),
        "mrr@5": mean_defined(mrr_at(5, scores, target, mask)),
        "map@5": mean_defined(map_at(5, scores, target, mask)),
        "log_loss": log_loss(scores, target, mask),
        "calibration_error": calibration_error(scores, target, mask),
        "accuracy": accuracy(scores, target, mask),
        "f1": f1(scores, target, mask),
    }


@jax.jit
def rating_metrics(scores: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Compute RMSE and MAE in units of the rating, and nDCG@5 with the rating as gain."""
    return {
        "rmse": rmse(scores, target, mask),
        "mae": mae(scores, target, mask),
        "ndcg@5": mean_defined(ndcg_at(5, scores, target, mask)),
    }


@jax.jit
def ranking_metrics(scores: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Compute nDCG@10 and @100, normalised recall@20 and @50, hit rate@10 and MRR@10 of 0/1 targets."""
    return {
        "ndcg@10": mean_defined(ndcg_at(10, scores, target, mask)),
        "ndcg@100": mean_defined(ndcg_at(100, scores, target, mask)),
        "recall@20": mean_defined(recall_at(20, scores, target, mask, normalised=True)),
        "recall@50": mean_defined(recall_at(50, scores, target, mask, normalised=True)),
        "hit_rate@10": mean_defined(hit_rate_at(10, scores, target, mask)),
        "mrr@10": mean_defined(mrr_at(10, scores, target, mask)),
    }


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask > 0, values, 0).sum() / _or_nan((mask > 0).sum())


def _or_nan(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.nan)


def _no_nan(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def _defined(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where((mask > 0).any(1), values, jnp.nan)


def _kept(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(jnp.asarray(mask) > 0, values, 0.0)


def _top(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the targets `[users, min(k, candidates)]` of the best candidates by score; padding comes last, as 0."""
    low = jnp.finfo(jnp.float32).min
    key = jnp.maximum(jnp.asarray(scores, jnp.float32), 0.9 * low)  # orders -inf above NaN, and NaN above padding
    key = jnp.where(jnp.asarray(mask) > 0, jnp.where(jnp.isnan(scores), low, key), -jnp.inf)
    best = jax.lax.top_k(key, min(k, key.shape[1]))[1]  # ties: the earlier first
    return jnp.take_along_axis(_kept(target, mask), best, axis=1)


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
