"""Target: ratings to what the model predicts, and back."""

from dataclasses import dataclass

import numpy as np

from metarec_jax.data.protocols import Protocol
from metarec_jax.data.splits import Histories


@dataclass(frozen=True)
class Target:
    """Ratings to what the model predicts, and back.

    Attributes:
      kind: "click" or "rating".
      threshold: lowest rating that is a click.
      mean, scale: a rating is standardised by these.
      levels: of clicks, the lowest and the highest rating: support sets then say how much an item was liked, from 0
        to 1. None: whether it was clicked.
    """

    kind: str
    threshold: float = 4.0
    mean: float = 0.0
    scale: float = 1.0
    levels: tuple[float, float] | None = None

    @classmethod
    def fit(cls, protocol: Protocol, train: Histories, graded: bool = False) -> "Target":
        """Mean, scale and levels from the training users' ratings alone."""
        rating = train.data.rating[train.index]
        if protocol.target == "click":
            lowest, highest = float(rating.min()), float(rating.max())
            return cls("click", protocol.threshold, levels=(lowest, highest) if graded and lowest < highest else None)
        return cls("rating", protocol.threshold, float(rating.mean()), float(rating.std()) or 1.0)

    def encode(self, rating: np.ndarray) -> np.ndarray:
        """float32 targets of ratings."""
        if self.kind == "click":
            return (rating >= self.threshold).astype(np.float32)
        return ((rating - self.mean) / self.scale).astype(np.float32)

    def grade(self, rating: np.ndarray) -> np.ndarray:
        """float32 targets of the ratings of a support set: those of `encode`, or how much of the way from the lowest
        to the highest rating."""
        if self.levels is None:
            return self.encode(rating)
        lowest, highest = self.levels
        return np.clip((rating - lowest) / (highest - lowest), 0, 1).astype(np.float32)

    def values(self, rating: np.ndarray) -> np.ndarray:
        """`[..., values]` all that `encode` and `grade` tell of ratings."""
        return np.stack([self.encode(rating)] + [self.grade(rating)] * (self.levels is not None), -1)

    def decode(self, scores: np.ndarray) -> np.ndarray:
        """Model scores as click probabilities (scores are logits) or as ratings."""
        if self.kind == "click":
            return 1 / (1 + np.exp(-np.clip(scores, -60, 60)))
        return scores * self.scale + self.mean
