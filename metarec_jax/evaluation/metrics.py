"""Metrics in JAX, batched over users: scores and targets `[users, candidates]` with a mask.

Ranking metrics sort a user's candidates by score; of equal scores the earlier candidate ranks first. AUC
counts a tie as one half; a NaN score ranks below every other. A metric that is not defined, for a user or for
the whole, is NaN; `mean_defined` leaves such users out.
"""

from typing import Literal

import jax
import jax.numpy as jnp


def mean_defined(per_user: jax.Array) -> jax.Array:
    """Mean over the users whose value is not NaN; NaN where there is none."""
    return jnp.nanmean(per_user)


def rmse(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Root mean squared error over all interactions, in units of the target."""
    return jnp.sqrt(_mean(jnp.subtract(scores, target) ** 2, mask))


def mae(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean absolute error over all interactions, in units of the target."""
    return _mean(jnp.abs(jnp.subtract(scores, target)), mask)


def log_loss(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean negative log-likelihood (nats) of 0/1 targets; probabilities are clipped to [1e-7, 1 - 1e-7]."""
    p = jnp.clip(probability, 1e-7, 1 - 1e-7)
    return _mean(-target * jnp.log(p) - (1 - target) * jnp.log1p(-p), mask)


def accuracy(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Share of interactions on the right side of 1/2."""
    return _mean((probability >= 0.5) == (target > 0.5), mask)


def precision(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Share of the interactions with `probability >= 1/2` that are positive; NaN where there is none."""
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return (guess & true).sum() / _or_nan(guess.sum())


def recall(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Share of the positive interactions that have `probability >= 1/2`; NaN where there is none."""
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return (guess & true).sum() / _or_nan(true.sum())


def f1(probability: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Harmonic mean of precision and recall of `probability >= 1/2` over all interactions; 0 if both are."""
    guess, true = (probability >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    return 2 * (guess & true).sum() / jnp.maximum(guess.sum() + true.sum(), 1)


def auc(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Area under the ROC curve over all interactions of all users together."""
    return _auc(scores.ravel(), target.ravel(), mask.ravel())


def within_user_auc(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """`[users]` area under each user's own ROC curve; NaN for users with one class only."""
    return jax.vmap(_auc)(scores, target, mask)


def precision_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """`[users]` share of positives among the top k (of k, also when there are fewer candidates)."""
    top = _ranked(scores, target, mask)[:, :k]
    return _defined(top.sum(1) / k, mask)


def recall_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """`[users]` share of a user's positives that are in the top k; NaN for users without positives."""
    ranked = _ranked(scores, target, mask)
    return ranked[:, :k].sum(1) / _or_nan(ranked.sum(1))


def f1_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """`[users]` harmonic mean of P@k and R@k; NaN for users without positives."""
    ranked = _ranked(scores, target, mask)
    return 2 * ranked[:, :k].sum(1) / (k + _or_nan(ranked.sum(1)))


def hit_rate_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """`[users]` 1 where a positive is among the top k, else 0; NaN for users without positives."""
    ranked = _ranked(scores, target, mask) > 0
    return jnp.where(ranked.any(1), ranked[:, :k].any(1), jnp.nan)


def map_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """`[users]` average precision at k: the mean, over a user's positives, of the precision at the rank of each that is
    in the top k (0 for the others), as trec_eval has it; NaN for users without positives."""
    ranked = _ranked(scores, target, mask)
    at_rank = jnp.cumsum(ranked, 1) / (1.0 + jnp.arange(ranked.shape[1]))
    return (ranked * at_rank)[:, :k].sum(1) / _or_nan(ranked.sum(1))


def ndcg_at(
    k: int, scores: jax.Array, target: jax.Array, mask: jax.Array, gain: Literal["linear", "exponential"] = "linear"
) -> jax.Array:
    """`[users]` discounted cumulative gain over the best possible one; NaN for users without gain.

    The discount is 1 / log2(1 + rank); the gain is the target (Järvelin and Kekäläinen, 2002) or 2^target - 1
    (Burges et al., 2005). For clicks the two are the same.
    """
    discount = 1 / jnp.log2(2.0 + jnp.arange(scores.shape[1]))
    discount = jnp.where(jnp.arange(scores.shape[1]) < k, discount, 0.0)
    gains = target if gain == "linear" else jnp.exp2(jnp.asarray(target, jnp.float32)) - 1
    gained = jnp.where(mask > 0, gains, 0.0)
    ideal = -jnp.sort(-gained, axis=1)
    return (_ranked(scores, gained, mask) * discount).sum(1) / _or_nan((ideal * discount).sum(1))


def mrr_at(k: int, scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """`[users]` 1 / rank of the first positive, 0 when outside the top k; NaN for users without positives."""
    ranked = _ranked(scores, target, mask) > 0
    hit = ranked[:, :k]
    value = jnp.where(hit.any(1), 1 / (1.0 + hit.argmax(1)), 0.0)
    return jnp.where(ranked.any(1), value, jnp.nan)


def reliability(
    probability: jax.Array, target: jax.Array, mask: jax.Array, bins: int = 10
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The reliability curve: mean probability, share of positives and count of each of `bins` equal parts of [0, 1].

    The first two are NaN where a bin is empty; 1 belongs to the last bin.
    """
    kept = jnp.asarray(mask).ravel() > 0
    p = jnp.where(kept, jnp.asarray(probability).ravel(), 0.0)
    bin_of = jnp.where(kept, jnp.clip((p * bins).astype(int), 0, bins - 1), bins)  # what is masked: a bin of its own
    positive = kept & (jnp.asarray(target).ravel() > 0.5)
    weights = (kept.astype(p.dtype), p, positive.astype(p.dtype))
    count, total, hits = (jnp.bincount(bin_of, w, length=bins + 1)[:bins] for w in weights)
    return total / _or_nan(count), hits / _or_nan(count), count


def calibration_error(probability: jax.Array, target: jax.Array, mask: jax.Array, bins: int = 10) -> jax.Array:
    """Expected calibration error: |mean probability - share of positives|, averaged over bins by their counts (Naeini
    et al., AAAI 2015)."""
    confidence, share, count = reliability(probability, target, mask, bins)
    return jnp.where(count > 0, jnp.abs(confidence - share) * count, 0.0).sum() / _or_nan(count.sum())


@jax.jit
def click_metrics(scores: jax.Array, target: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The click table: AUC, within-user AUC, P@5, R@5, nDCG@5, MRR@5, MAP@5; log-loss, calibration, accuracy and F1."""
    return {
        "auc": auc(scores, target, mask),
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
    """The rating table: RMSE and MAE in stars, nDCG@5 with the rating as gain."""
    return {
        "rmse": rmse(scores, target, mask),
        "mae": mae(scores, target, mask),
        "ndcg@5": mean_defined(ndcg_at(5, scores, target, mask)),
    }


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask > 0, values, 0).sum() / _or_nan((mask > 0).sum())


def _or_nan(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.nan)


def _no_nan(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def _defined(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where((mask > 0).any(1), values, jnp.nan)


def _ranked(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Targets in the order of falling scores; masked candidates come last, as 0."""
    order = jnp.lexsort((-_no_nan(scores), mask <= 0), axis=1)
    return jnp.take_along_axis(jnp.where(mask > 0, target, 0.0), order, axis=1)


def _auc(scores: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mann-Whitney: (sum of the positives' mid-ranks - p (p + 1) / 2) / (p n)."""
    kept, scores = mask > 0, _no_nan(scores)
    positive, negative = kept & (target > 0.5), kept & (target <= 0.5)
    ordered = jnp.sort(jnp.where(kept, scores, jnp.inf))
    low = jnp.searchsorted(ordered, scores, side="left")
    high = jnp.minimum(jnp.searchsorted(ordered, scores, side="right"), kept.sum())  # not into the padding
    rank = jnp.where(positive, (low + high + 1) / 2, 0.0)
    p, n = positive.sum(), negative.sum()
    value = (rank.sum() / jnp.maximum(p, 1) - (p + 1) / 2) / jnp.maximum(n, 1)
    return jnp.where((p > 0) & (n > 0), value, jnp.nan)
