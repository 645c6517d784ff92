"""Intervals: paired differences between learners by a bootstrap over users, with a correction for many comparisons.

The users are what is drawn anew, not the splits: a user who is tested in several splits stays one person, and splits
share most of their training users, so that an interval over splits alone would be too narrow.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from metarec_jax.evaluation.baselines import BASELINES
from metarec_jax.evaluation.comparison import Comparison
from metarec_jax.metrics import pointwise as metrics

AT_5 = ("precision", "recall", "ndcg", "mrr", "map")
PER_USER: dict[str, Callable] = {  # means over users who have a value
    "within_user_auc": metrics.within_user_auc,
    **{f"{name}@5": partial(getattr(metrics, f"{name}_at"), 5) for name in AT_5},
}
PER_INTERACTION: dict[str, Callable] = {  # means over all interactions
    "log_loss": lambda p, t: -np.log(np.where(t > 0.5, p, 1 - p).clip(1e-7, 1)),
    "accuracy": lambda p, t: (p >= 0.5) == (t > 0.5),
    "mae": lambda p, t: np.abs(p - t),
    "rmse": lambda p, t: np.square(p - t),  # the root of the mean is taken at the end
}
ORDER = ("few", "some", "many", "tail", "old", "middle", "head", "new")  # of the labels that are thirds
LESS_IS_BETTER = ("log_loss", "mae", "rmse")
METRICS = {"click": ("auc", *PER_USER, "log_loss", "accuracy"), "rating": ("rmse", "mae", "ndcg@5")}


class Difference(NamedTuple):
    """A learner minus another: mean, the ends of its interval, and the two-sided p value that there is none."""

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
    """`[splits]` values of a metric, NaN where it is not defined.

    Args:
      comparison: from `compare`.
      learner: one of `comparison.learners`.
      metric: one of `METRICS`.
      support: one of the comparison's support sizes.
      users, items: `[user rows]` and `[item rows]` bool, whose interactions count (default: all).
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
    """The mean over splits of `learner` minus `other` on the same tasks, with a percentile bootstrap over users.

    In each draw every user gets the number of times that it comes up among as many users drawn with replacement, the
    same in every split in which it is tested and for both learners (Efron and Tibshirani, 1993, chapter 13).

    Args:
      comparison: from `compare`.
      learner, other: two of `comparison.learners`.
      metric: one of `METRICS`.
      support: one of the comparison's support sizes.
      draws: bootstrap samples.
      level: of the interval.
      seed: of the draws; the same draws serve every pair of learners.
    """
    everyone = np.unique(np.concatenate([comparison.runs[learner, s].users for s in comparison.seeds]))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(everyone), np.full(len(everyone), 1 / len(everyone)), size=draws).astype(np.float32)
    total, found = np.zeros(draws), 0.0
    for s in comparison.seeds:
        here = weights[:, np.searchsorted(everyone, comparison.runs[learner, s].users)]
        for sign, name in ((1, learner), (-1, other)):
            sums = _sums(comparison, name, s, metric, support)
            total += sign * sums.value(here)
            found += sign * float(sums.value())
    total, found = total / len(comparison.seeds), found / len(comparison.seeds)
    low, high = np.nanquantile(total, [(1 - level) / 2, (1 + level) / 2])
    side = min((total <= 0).mean(), (total >= 0).mean())
    return Difference(found, float(low), float(high), float(min(1.0, 2 * max(side, 1 / draws))))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for how many there are (Holm, 1979): the chance that any of them is a false alarm stays below
    the level."""
    ordered = sorted(p, key=lambda name: p[name])
    found, highest = {}, 0.0
    for i, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - i) * p[name]))
        found[name] = highest
    return {name: found[name] for name in p}


def best_baseline(comparison: Comparison, metric: str, support: int | None = None) -> str:
    """The baseline that is best in a metric on average; what a strategy must beat."""
    sign = -1 if metric in LESS_IS_BETTER else 1
    known = [b for b in BASELINES if b in comparison.learners]
    return max(known, key=lambda b: sign * np.nanmean(values(comparison, b, metric, support)))


def by_segment(
    comparison: Comparison, learner: str, metric: str, segment: str, support: int | None = None
) -> dict[str, float]:
    """A metric within each label of a segment (`comparison.segments`), mean over the splits in which it is defined.

    A segment of items counts the interactions with its items, also inside metrics over users.
    """
    labels = comparison.segments[segment]
    found = {}
    for label in sorted(set(labels.tolist()) - {""}, key=lambda k: (ORDER.index(k) if k in ORDER else len(ORDER), k)):
        which: dict[str, np.ndarray] = {"users" if segment.startswith("user/") else "items": labels == label}
        per_split = values(comparison, learner, metric, support, **which)
        if np.isfinite(per_split).any():
            found[label] = float(np.nanmean(per_split))
    return found


class _Sums(NamedTuple):
    """A metric of one run in a form that user weights can be put on.

    Attributes:
      top, bottom: `[users]`: the metric is sum(w top) / sum(w bottom); empty for the AUC.
      root: take the root of it.
      ordered: of the AUC: users, classes and tie groups of the interactions, by rising score.
    """

    top: np.ndarray
    bottom: np.ndarray
    root: bool = False
    ordered: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def value(self, weights: np.ndarray | None = None) -> np.ndarray:
        """The metric with every user once (a scalar), or with `weights` `[draws, users]` (`[draws]`)."""
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
    """One run's metric over the chosen user rows and item rows (None: all)."""
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
    """Area under the ROC curve of interactions in rising order of score, with their users' weights."""
    w = np.ones((1, len(user))) if weights is None else weights[:, user]
    value = np.full(len(w), np.nan)
    if len(user):
        start = np.flatnonzero(np.diff(ties, prepend=-1))
        up, down = (np.add.reduceat(np.where(side, w, 0.0), start, axis=1) for side in (positive, ~positive))
        below = np.cumsum(down, axis=1) - down / 2
        pairs = up.sum(1) * down.sum(1)
        np.divide((up * below).sum(1), pairs, out=value, where=pairs > 0)
    return value[0] if weights is None else value
