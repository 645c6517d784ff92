"""Totals: click metrics of users that come in blocks, in memory that does not grow with their candidates."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.metrics import pointwise as metrics
from metarec_jax.metrics.scoring import Scores

NEGATIVES = 1 << 24  # scores of negatives that are kept; the pooled AUC of more is approximate
EDGES = 1 << 18  # edges between which further negatives are counted


def summarise_blocks(blocks: Iterator[Scores]) -> dict[str, float]:
    """Compute the click metrics of users that come in blocks; the same as `summarise` of all of them.

    The pooled AUC is exact up to `NEGATIVES` negatives. Further ones are counted between `EDGES` quantiles of the
    first, and lose or win half against a positive between the same two. The error is at most half the largest share of
    negatives between two edges, about 1 / (2 EDGES) = 2e-6.

    Args:
      blocks: scores of a block of users each, of one width. The first block is the largest.
    """
    pooled, size = _PooledAUC(), 0
    users: list[dict[str, np.ndarray]] = []
    totals: dict[str, Any] = {}
    for block in blocks:
        size = size or len(block.scores)
        padded = (np.pad(np.asarray(x), ((0, size - len(block.scores)), (0, 0))) for x in block)
        per_user, sums = jax.device_get(_of_block(*padded))
        users.append({name: values[: len(block.scores)] for name, values in per_user.items()})
        totals = {name: totals.get(name, 0.0) + np.asarray(value, float) for name, value in sums.items()}
        pooled.add(block)
    count = float(totals["count"]) or float("nan")
    gap = np.abs(totals["confidence"] - totals["hits"]).sum()  # sum_b n_b |confidence_b - share_b|
    table = {name: _mean_defined(np.concatenate([each[name] for each in users])) for name in users[0]}
    table |= {
        "accuracy": float(totals["accuracy"] / count),
        "calibration_error": float(gap / count),
        "f1": float(2 * totals["true"] / max(totals["guessed"] + totals["positive"], 1)),
        "log_loss": float(totals["log_loss"] / count),
    }
    return {"auc": pooled.value()} | dict(sorted(table.items()))


def _mean_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean(dtype=float)) if len(defined) else float("nan")


@jax.jit
def _of_block(
    scores: jax.Array, target: jax.Array, mask: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the metrics of each user `[users]`, and sums over all interactions."""
    per_user = {
        "within_user_auc": metrics.within_user_auc(scores, target, mask),
        "precision@5": metrics.precision_at(5, scores, target, mask),
        "recall@5": metrics.recall_at(5, scores, target, mask),
        "ndcg@5": metrics.ndcg_at(5, scores, target, mask),
        "mrr@5": metrics.mrr_at(5, scores, target, mask),
        "map@5": metrics.map_at(5, scores, target, mask),
    }
    count = (mask > 0).sum()
    guess, positive = (scores >= 0.5) & (mask > 0), (target > 0.5) & (mask > 0)
    confidence, share, of_bin = metrics.reliability(scores, target, mask)
    sums = {
        "count": count,
        "log_loss": jnp.where(count > 0, metrics.log_loss(scores, target, mask) * count, 0.0),
        "accuracy": jnp.where(count > 0, metrics.accuracy(scores, target, mask) * count, 0.0),
        "guessed": guess.sum(),
        "positive": positive.sum(),
        "true": (guess & positive).sum(),
        "confidence": jnp.where(of_bin > 0, confidence * of_bin, 0.0),
        "hits": jnp.where(of_bin > 0, share * of_bin, 0.0),
    }
    return per_user, sums


class _PooledAUC:
    """The AUC over the pooled interactions of blocks of users."""

    def __init__(self) -> None:
        self.positives: list[np.ndarray] = []
        self.negatives: list[np.ndarray] = []  # not yet counted
        self.edges = np.zeros(0, np.float32)
        self.counts = np.zeros(1)  # slots 2 i + 1: equal to edge i; slots 2 i: between the edges i - 1 and i

    def add(self, block: Scores) -> None:
        scores, target, mask = (np.asarray(x) for x in block)
        scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float32)
        positive = target > 0.5
        self.positives.append(scores[(mask > 0) & positive])
        self.negatives.append(scores[(mask > 0) & ~positive])
        if sum(map(len, self.negatives)) > NEGATIVES:
            self._count()

    def _count(self) -> None:
        """Count the kept negatives between the edges; the first of them set the edges."""
        ordered = np.sort(np.concatenate(self.negatives))
        self.negatives = []
        if not len(self.edges):
            self.edges = np.unique(ordered[:: max(len(ordered) // EDGES, 1)])
            self.counts = np.zeros(2 * len(self.edges) + 1)
        ends = np.stack([np.searchsorted(ordered, self.edges, side) for side in ("left", "right")], 1).ravel()
        self.counts += np.diff(np.concatenate([[0], ends, [len(ordered)]]))

    def value(self) -> float:
        up = np.concatenate(self.positives)
        if not len(self.edges):
            scores: Any = np.concatenate([up, *self.negatives])
            target: Any = np.arange(len(scores)) < len(up)
            return float(metrics.auc(scores, target, np.ones_like(target)))
        if self.negatives:
            self._count()
        place = np.searchsorted(self.edges, up)
        slot = 2 * place + (self.edges[np.minimum(place, len(self.edges) - 1)] == up)
        before = np.cumsum(self.counts) - self.counts
        wins = before[slot] + self.counts[slot] / 2
        return float(wins.mean() / self.counts.sum()) if len(up) else float("nan")
