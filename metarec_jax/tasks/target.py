"""Target: maps ratings to model targets, and scores back to ratings or probabilities."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_jax.errors import DataError
from metarec_jax.tasks.protocols import Protocol
from metarec_jax.tasks.splits import Histories

MOST_LEVELS = 9


@dataclass(frozen=True)
class Target:
    """Mapping of ratings to model targets; `encode`, `grade` and `decode` accept numpy and JAX arrays.

    Attributes:
      kind: "click", "rating" or "ranking".
      threshold: lowest rating that is a click.
      mean, scale: statistics that standardise a rating.
      levels: ratings in ascending order, at most `MOST_LEVELS`, for clicks and rankings. Support targets then are
        grades from the lowest to the highest (`grade`). None: support targets are clicks.

    Example:
      >>> target = mr.tasks.Target("rating", mean=3.0, scale=2.0)
      >>> target.encode(np.array([3.0, 5.0])), target.decode(np.array([0.0, 1.0]))
      (array([0., 1.], dtype=float32), array([3., 5.]))
      >>> mr.tasks.Target("click", threshold=4.0).encode(np.array([3.0, 5.0]))
      array([0., 1.], dtype=float32)
    """

    kind: str
    threshold: float = 4.0
    mean: float = 0.0
    scale: float = 1.0
    levels: tuple[float, ...] | None = None

    @classmethod
    def fit(cls, protocol: Protocol, train: Histories, graded: bool = True) -> "Target":
        """Fit mean, scale and levels on the training users' ratings.

        Args:
          protocol: its `target` and `threshold` are used.
          train: the training users.
          graded: whether clicks have levels.

        Raises:
          DataError: all ratings are clicks, or none is.
        """
        rating, threshold = train.data.rating[train.index], protocol.threshold
        if protocol.target == "rating":
            threshold = float(rating.min()) if threshold is None else threshold
            return cls("rating", threshold, float(rating.mean()), float(rating.std()) or 1.0)
        distinct = np.unique(rating)
        if protocol.target == "ranking":
            distinct = np.unique(train.data.rating)  # the training users may have positives only
            if len(distinct) == 1 or threshold is None:  # every interaction is positive
                return cls("ranking", float(distinct[0]))
            if rating.max() < threshold:
                raise DataError(
                    f"rating: the highest rating of the training users is {rating.max():g}, so that none is positive "
                    f"(threshold {threshold:g}); give the protocol another threshold"
                )
        assert threshold is not None
        if protocol.target == "click" and (distinct[0] >= threshold or distinct[-1] < threshold):
            raise DataError(
                f"rating: the training users' ratings go from {distinct[0]:g} to {distinct[-1]:g}, so that "
                f"{'each' if distinct[0] >= threshold else 'none'} is a click (threshold {threshold:g}) "
                "and there is nothing to learn; give the protocol another threshold, predict ratings "
                '(target="rating"), or add negatives (mr.data.with_negatives)'
            )
        if len(distinct) > MOST_LEVELS:
            distinct = np.linspace(distinct[0], distinct[-1], MOST_LEVELS)  # the same grades in every split
        levels = tuple(distinct.tolist()) if graded and len(distinct) > 2 else None
        return cls(protocol.target, threshold, levels=levels)

    def encode(self, rating: Any) -> Any:
        """Map ratings to float32 targets: 0/1 clicks, or standardised ratings."""
        if self.kind != "rating":
            return (rating >= self.threshold).astype(np.float32)
        return ((rating - self.mean) / self.scale).astype(np.float32)

    def grade(self, rating: Any) -> Any:
        """Map the ratings of a support set to float32 targets.

        With levels, the relative position between the lowest and the highest rating, in [0, 1]; else as `encode`.
        """
        if self.levels is None:
            return self.encode(rating)
        lowest, highest = self.levels[0], self.levels[-1]
        return rating.__array_namespace__().clip((rating - lowest) / (highest - lowest), 0, 1).astype(np.float32)

    def values(self, rating: np.ndarray) -> np.ndarray:
        """Return all encodings of ratings, `[..., values]`: `encode` and, with levels, `grade`."""
        return np.stack([self.encode(rating)] + [self.grade(rating)] * (self.levels is not None), -1)

    def decode(self, scores: Any) -> Any:
        """Map model scores to click probabilities or ratings.

        Click scores are logits. Ranking scores are returned unchanged.
        """
        if self.kind == "ranking":
            return scores
        if self.kind == "click":
            array = scores.__array_namespace__()
            return 1 / (1 + array.exp(-array.clip(scores, -60, 60)))
        return scores * self.scale + self.mean
