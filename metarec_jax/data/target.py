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
    """

    kind: str
    threshold: float = 4.0
    mean: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(cls, protocol: Protocol, train: Histories) -> "Target":
        """Mean and scale from the training users' ratings alone."""
        if protocol.target == "click":
            return cls("click", protocol.threshold)
        rating = train.data.rating[train.index]
        return cls("rating", protocol.threshold, float(rating.mean()), float(rating.std()) or 1.0)

    def encode(self, rating: np.ndarray) -> np.ndarray:
        """float32 targets of ratings."""
        if self.kind == "click":
            return (rating >= self.threshold).astype(np.float32)
        return ((rating - self.mean) / self.scale).astype(np.float32)

    def decode(self, scores: np.ndarray) -> np.ndarray:
        """Model scores as click probabilities (scores are logits) or as ratings."""
        if self.kind == "click":
            return 1 / (1 + np.exp(-np.clip(scores, -60, 60)))
        return scores * self.scale + self.mean
