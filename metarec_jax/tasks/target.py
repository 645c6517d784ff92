"""Target: ratings to what the model predicts, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_jax.errors import DataError
from metarec_jax.tasks.protocols import Protocol
from metarec_jax.tasks.splits import Histories

MOST_LEVELS = 9


@dataclass(frozen=True)
class Target:
    """Ratings to what the model predicts, and back; `encode`, `grade` and `decode` take arrays of numpy or of JAX.

    Attributes:
      kind: "click", "rating" or "ranking".
      threshold: lowest rating that is a click.
      mean, scale: a rating is standardised by these.
      levels: of clicks, ratings in ascending order, all there are or some between the lowest and the highest: support
        sets then say how much an item was liked (`grade`). None: whether it was clicked.
    """

    kind: str
    threshold: float = 4.0
    mean: float = 0.0
    scale: float = 1.0
    levels: tuple[float, ...] | None = None

    @classmethod
    def fit(cls, protocol: Protocol, train: Histories, graded: bool = True) -> "Target":
        """Mean, scale and levels from the training users' ratings alone; without `graded` clicks have no levels.

        Raises:
          DataError: all of these ratings are clicks, or none is.
        """
        rating, threshold = train.data.rating[train.index], protocol.threshold
        if protocol.target == "rating":
            threshold = float(rating.min()) if threshold is None else threshold
            return cls("rating", threshold, float(rating.mean()), float(rating.std()) or 1.0)
        found = np.unique(rating)
        if protocol.target == "ranking":
            found = np.unique(train.data.rating)  # a protocol may keep the positives alone
            if len(found) == 1 or threshold is None:  # all that users did is positive
                return cls("ranking", float(found[0]))
            if rating.max() < threshold:
                raise DataError(
                    f"rating: the highest of the training users is {rating.max():g}, so that none is positive "
                    f"(threshold {threshold:g}); give the protocol another threshold"
                )
        assert threshold is not None
        if protocol.target == "click" and (found[0] >= threshold or found[-1] < threshold):
            raise DataError(
                f"rating: all of the training users go from {found[0]:g} to {found[-1]:g}, so that "
                f"{'each' if found[0] >= threshold else 'none'} is a click (threshold {threshold:g}) "
                "and there is nothing to learn; give the protocol another threshold, predict ratings "
                '(target="rating"), or add negatives (mr.data.with_negatives)'
            )
        if len(found) > MOST_LEVELS:
            found = np.unique(np.quantile(found, np.linspace(0, 1, MOST_LEVELS)))
        levels = tuple(found.tolist()) if graded and len(found) > 2 else None
        return cls(protocol.target, threshold, levels=levels)

    def encode(self, rating: Any) -> Any:
        """float32 targets of ratings."""
        if self.kind != "rating":
            return (rating >= self.threshold).astype(np.float32)
        return ((rating - self.mean) / self.scale).astype(np.float32)

    def grade(self, rating: Any) -> Any:
        """float32 targets of the ratings of a support set: those of `encode`; or, with levels, how much of the way from
        the lowest to the highest rating, in [0, 1]."""
        if self.levels is None:
            return self.encode(rating)
        lowest, highest = self.levels[0], self.levels[-1]
        return rating.__array_namespace__().clip((rating - lowest) / (highest - lowest), 0, 1).astype(np.float32)

    def values(self, rating: np.ndarray) -> np.ndarray:
        """`[..., values]` all that `encode` and `grade` tell of ratings."""
        return np.stack([self.encode(rating)] + [self.grade(rating)] * (self.levels is not None), -1)

    def decode(self, scores: Any) -> Any:
        """Model scores as click probabilities (scores are logits), as ratings, or, of a ranking, as they are."""
        if self.kind == "ranking":
            return scores
        if self.kind == "click":
            array = scores.__array_namespace__()
            return 1 / (1 + array.exp(-array.clip(scores, -60, 60)))
        return scores * self.scale + self.mean
