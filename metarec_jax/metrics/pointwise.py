"""Metrics in JAX, batched over users: scores and targets `[users, candidates]` with a mask.

Ranking metrics sort a user's candidates by score; ties keep the order of the candidates. AUC is in `roc`.
A NaN score ranks last. An undefined metric, of a user or overall, is NaN; `mean_defined` skips such users.

In all functions `scores` or `probability`, `target` and `mask` are `[users, candidates]`; the mask is 0 for padding.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from metarec_jax.metrics.roc import auc, within_user_auc


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
    """Compute the mean absolute error over all interactions, in units of the target.

    Example:
      >>> float(mr.metrics.mae(jnp.array([[4.0, 1.0]]), jnp.array([[3.0, 8.0]]), jnp.ones((1, 2))))
      4.0
    """
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
    """Compute the share of positives that have `probability >= 1/2`; NaN if there are no positives.

    Example:
      >>> float(mr.metrics.recall(jnp.array([[0.9, 0.8, 0.4]]), jnp.array([[1, 0, 1]]), jnp.ones((1, 3))))
      0.5
    """
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return (guess & true).sum() / _or_nan(true.sum())


def f1(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the harmonic mean of precision and recall at `probability >= 1/2`; 0 if both are.

    Example:
      >>> probability, target = jnp.array([[0.9, 0.8, 0.7, 0.4]]), jnp.array([[1, 0, 0, 0]])
      >>> float(mr.metrics.f1(probability, target, jnp.ones((1, 4))))  # of precision 1/3 and recall 1
      0.5
    """
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return 2 * (guess & true).sum() / jnp.maximum(guess.sum() + true.sum(), 1)


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
    """Compute the harmonic mean of P@k and R@k, `[users]`; NaN for users without positives.

    Example:
      >>> scores, target = jnp.array([[4.0, 3.0, 2.0, 1.0]]), jnp.array([[0, 0, 1, 0]])
      >>> mr.metrics.f1_at(3, scores, target, jnp.ones((1, 4)))  # of P@3 = 1/3 and R@3 = 1
      Array([0.5], dtype=float32)
    """
    return 2 * _top(k, scores, target, mask).sum(1) / (k + _or_nan(_kept(target, mask).sum(1)))


def hit_rate_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the hit rate, `[users]`: 1 if a positive is in the top k, else 0.

    NaN for users without positives.

    Example:
      >>> mr.metrics.hit_rate_at(2, jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[0, 1, 1]]), jnp.ones((1, 3))).tolist()
      [1.0]
    """
    hit = (_top(k, scores, target, mask) > 0).any(1).astype(jnp.float32)
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
    value = jnp.where(hit.any(1), 1 / (1 + hit.argmax(1).astype(jnp.float32)), 0.0)
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
    """Compute RMSE and MAE in units of the rating, and nDCG@5 with the rating as gain.

    Example:
      >>> table = mr.metrics.rating_metrics(jnp.array([[4.0, 1.0]]), jnp.array([[5.0, 2.0]]), jnp.ones((1, 2)))
      >>> float(table["rmse"]), float(table["mae"]), float(table["ndcg@5"])
      (1.0, 1.0, 1.0)
    """
    return {
        "rmse": rmse(scores, target, mask),
        "mae": mae(scores, target, mask),
        "ndcg@5": mean_defined(ndcg_at(5, scores, target, mask)),
    }


@jax.jit
def ranking_metrics(scores: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Compute nDCG@10 and @100, normalised recall@20 and @50, hit rate@10 and MRR@10 of 0/1 targets.

    Example:
      >>> table = mr.metrics.ranking_metrics(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[0, 1, 0]]), jnp.ones((1, 3)))
      >>> float(table["recall@20"]), float(table["hit_rate@10"]), float(table["mrr@10"])
      (1.0, 1.0, 0.5)
    """
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
    return jnp.where(x > 0, x, jnp.float32(jnp.nan))  # strongly typed also for counts


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
