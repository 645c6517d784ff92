"""Ranking: settings of the ranking objective."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Ranking:
    """The ranking objective: which item of the whole catalogue does a user choose?

        loss = -mean_u sum_j w_uj log softmax(scores of u over all items but the support)_j / sum_j w_uj

    Of a strategy with `prefixes` and histories in order, u runs over all places of all histories, each with the item
    that came next as its one positive, among all items. Otherwise j runs over the query positives of u, and w_uj is
    p_uj^(focus n / (n + 50)) with n support positives, held constant: of a user who is known well, a positive that will
    not come near the top of the list counts less, as it does for nDCG; of one who is not, all count about the same.

    Attributes:
      sample: how many items the softmax runs over, drawn once a step for the whole batch and corrected by the log of
        how likely each is to be drawn; None: all, where the catalogue has at most `FULL` items and the batch not more
        than `CELLS` scores of them, else 2,048.
      by: how they are drawn: "uniform", "popularity", or "batch", the other users' query items.
      focus: exponent of the weights for long supports; 0 is the plain log-likelihood.
      short: share of training users whose support is cut to a random length, log-uniform to all, or to nothing. Without
        any, what a user without a history gets is not trained.
      dislikes: share of training users whose support shows the interactions below the threshold too.
      unknown: share of users, and of items, whose identity is hidden in a step, so that what is new is trained too.
      folds: closed-form parts that meta-training sees are fitted to the users of the other folds.
      query: most query positives of a training user.

    References:
      Liang et al., Variational Autoencoders for Collaborative Filtering, WWW 2018, equation 2 (multinomial likelihood).
      Bengio and Senécal, Adaptive Importance Sampling, IEEE TNN 2008 (sampled softmax).
    """

    sample: int | None = None
    by: Literal["uniform", "popularity", "batch"] = "uniform"
    focus: float = 0.8
    short: float = 0.7
    dislikes: float = 0.8
    unknown: float = 0.05
    folds: int = 4
    query: int = 64

    def __post_init__(self) -> None:
        if self.by not in ("uniform", "popularity", "batch"):
            raise ValueError(f'by is "uniform", "popularity" or "batch", got {self.by!r}')
        if (self.sample is not None and self.sample < 1) or self.focus < 0 or self.folds < 2 or self.query < 1:
            raise ValueError(f"need sample >= 1, focus >= 0, folds >= 2 and query >= 1, got {self}")
        if not all(0 <= share <= 1 for share in (self.short, self.dislikes, self.unknown)):
            raise ValueError(f"short, dislikes and unknown are shares from 0 to 1, got {self}")
