"""Confidence intervals: paired bootstrap differences between learners, with Holm's correction.

Users are resampled, not splits. A user who is tested in several splits is one resampling unit, and splits share most of
their training users, so an interval over splits alone would be too narrow.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from metarec_jax.data.schema import USER
from metarec_jax.evaluation.baselines import BASELINES
from metarec_jax.evaluation.comparison import Comparison
from metarec_jax.metrics import pointwise as metrics
from metarec_jax.metrics import roc

AT_5 = ("precision", "recall", "ndcg", "mrr", "map")
PER_USER: dict[str, Callable] = {  # averaged over users whose value is defined
    "within_user_auc": roc.within_user_auc,
    **{f"{name}@5": partial(getattr(metrics, f"{name}_at"), 5) for name in AT_5},
}
PER_INTERACTION: dict[str, Callable] = {  # averaged over all interactions
    "log_loss": lambda p, t: -np.log(np.where(t > 0.5, p, 1 - p).clip(1e-7, 1)),
    "accuracy": lambda p, t: (p >= 0.5) == (t > 0.5),
    "mae": lambda p, t: np.abs(p - t),
    "rmse": lambda p, t: np.square(p - t),  # `_Sums.value` takes the root of the mean
}
ORDER = ("few", "some", "many", "tail", "old", "middle", "head", "new")  # display order of labels by thirds
LESS_IS_BETTER = ("log_loss", "mae", "rmse")
METRICS = {"click": ("auc", *PER_USER, "log_loss", "accuracy"), "rating": ("rmse", "mae", "ndcg@5")}


class Difference(NamedTuple):
    """Paired difference of two learners: mean, interval [low, high], and two-sided p value of no difference."""

    mean: float
    low: float
    high: float
    p: float


def values(
    comparison: Comparison,
    learner: str,
    metric: str,
    support: int | None = None,
    *,
    users: np.ndarray | None = None,
    items: np.ndarray | None = None,
) -> np.ndarray:
    """Compute a metric on each split, `[splits]`; NaN where undefined.

    Args:
      comparison: from `compare`.
      learner: one of `comparison.learners`.
      metric: one of `METRICS`.
      support: one of the comparison's support sizes.
      users, items: `[user rows]` and `[item rows]` bool masks of the interactions that count (default: all).
    """
    seeds = comparison.seeds
    return np.array([float(_sums(comparison, learner, s, metric, support, users, items).value()) for s in seeds])


def difference(
    comparison: Comparison,
    learner: str,
    other: str,
    metric: str,
    support: int | None = None,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compute the mean of `learner` minus `other` over splits, with a bootstrap interval.

    Both are evaluated on the same tasks. The percentile bootstrap resamples as many users as there are, with
    replacement. A user has the same weight in all splits in which it is tested, and for both learners (Efron and
    Tibshirani, 1993, chapter 13).

    Args:
      comparison: from `compare`.
      learner, other: two of `comparison.learners`.
      metric: one of `METRICS`.
      support: one of the comparison's support sizes.
      draws: number of bootstrap samples.
      level: confidence level of the interval.
      seed: seed of the bootstrap; all pairs of learners share the samples.
    """
    everyone = np.unique(np.concatenate([comparison.runs[learner, s].users for s in comparison.seeds]))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(everyone), np.full(len(everyone), 1 / len(everyone)), size=draws).astype(np.float32)
    total, mean = np.zeros(draws), 0.0
    for s in comparison.seeds:
        sample_weights = weights[:, np.searchsorted(everyone, comparison.runs[learner, s].users)]
        for sign, name in ((1, learner), (-1, other)):
            sums = _sums(comparison, name, s, metric, support)
            total += sign * sums.value(sample_weights)
            mean += sign * float(sums.value())
    total, mean = total / len(comparison.seeds), mean / len(comparison.seeds)
    total = total[np.isfinite(total)]  # a sample without a positive has no AUC
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    side = min((total <= 0).mean(), (total >= 0).mean())
    return Difference(mean, float(low), float(high), float(min(1.0, 2 * max(side, 1 / draws))))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Correct p values for multiple testing by Holm's method (1979).

    It controls the family-wise error rate.

    Args:
      p: p values by name.

    Example:
      >>> mr.evaluation.intervals.holm({"maml": 0.03, "ridge": 0.01, "cnp": 0.5})  # 2 * 0.03, 3 * 0.01, 1 * 0.5
      {'maml': 0.06, 'ridge': 0.03, 'cnp': 0.5}
    """
    ordered = sorted(p, key=lambda name: p[name])
    corrected, highest = {}, 0.0
    for i, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - i) * p[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p}


def best_baseline(comparison: Comparison, metric: str, support: int | None = None) -> str:
    """Return the baseline with the best mean of a metric over splits."""
    sign = -1 if metric in LESS_IS_BETTER else 1
    baselines = [b for b in BASELINES if b in comparison.learners]
    return max(baselines, key=lambda b: sign * np.nanmean(values(comparison, b, metric, support)))


def by_segment(
    comparison: Comparison, learner: str, metric: str, segment: str, support: int | None = None
) -> dict[str, float]:
    """Compute a metric for each label of a segment, averaged over the splits where it is defined.

    In a segment of items, only interactions with the label's items count, also within per-user metrics.

    Args:
      comparison: from `compare`.
      learner: one of `comparison.learners`.
      metric: one of `METRICS`.
      segment: one of `comparison.segments`.
      support: one of the comparison's support sizes.
    """
    labels = comparison.segments[segment]
    by_label = {}
    for label in sorted(set(labels.tolist()) - {""}, key=lambda k: (ORDER.index(k) if k in ORDER else len(ORDER), k)):
        selection: dict[str, np.ndarray] = {"users" if segment.startswith(USER) else "items": labels == label}
        per_split = values(comparison, learner, metric, support, **selection)
        if np.isfinite(per_split).any():
            by_label[label] = float(np.nanmean(per_split))
    return by_label


class _Sums(NamedTuple):
    """Sufficient statistics of a metric of one run, to weight users.

    Attributes:
      top, bottom: `[users]` numerators and denominators: the metric is sum(w top) / sum(w bottom). Empty for AUC.
      root: whether to take the square root.
      ordered: for AUC: users, classes and tie groups of the interactions, by ascending score.
    """

    top: np.ndarray
    bottom: np.ndarray
    root: bool = False
    ordered: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def value(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Compute the metric with equal weights (a scalar), or with `weights` `[draws, users]` (`[draws]`)."""
        if self.ordered is not None:
            return _weighted_auc(*self.ordered, weights)
        top, bottom = (
            (self.top.sum(), self.bottom.sum()) if weights is None else (weights @ self.top, weights @ self.bottom)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            value = np.where(bottom > 0, top / bottom, np.nan)
        return np.sqrt(value) if self.root else value


def _sums(
    comparison: Comparison,
    learner: str,
    seed: int,
    metric: str,
    support: int | None,
    users: np.ndarray | None = None,
    items: np.ndarray | None = None,
) -> _Sums:
    """Gather the statistics of one run over the selected user and item rows (None: all)."""
    run, (scores, target, mask) = comparison.runs[learner, seed], comparison.scores(learner, seed, support)
    mask = mask > 0
    if users is not None:
        mask = mask & users[run.users][:, None]
    if items is not None:
        mask = mask & items[run.items]
    if metric == "auc":
        user = np.broadcast_to(np.arange(len(mask))[:, None], mask.shape)[mask]
        order = np.argsort(scores[mask], kind="stable")
        ties = np.unique(scores[mask][order], return_inverse=True)[1]
        return _Sums(np.zeros(0), np.zeros(0), ordered=(user[order], target[mask][order] > 0.5, ties))
    if metric in PER_USER:
        value = np.asarray(PER_USER[metric](scores, target, mask.astype(np.float32)))
        defined = ~np.isnan(value)
        return _Sums(np.where(defined, value, 0), defined.astype(float))
    value = np.where(mask, PER_INTERACTION[metric](scores, target), 0.0)
    return _Sums(value.sum(1), mask.sum(1).astype(float), metric == "rmse")


def _weighted_auc(user: np.ndarray, positive: np.ndarray, ties: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Compute the user-weighted AUC of interactions in ascending order of score."""
    w = np.ones((1, len(user))) if weights is None else weights[:, user]
    value = np.full(len(w), np.nan)
    if len(user):
        start = np.flatnonzero(np.diff(ties, prepend=-1))
        up, down = (np.add.reduceat(np.where(side, w, 0.0), start, axis=1) for side in (positive, ~positive))
        below = np.cumsum(down, axis=1) - down / 2
        pairs = up.sum(1) * down.sum(1)
        np.divide((up * below).sum(1), pairs, out=value, where=pairs > 0)
    return value[0] if weights is None else value
