"""Objective: settings of the ranking objective."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Ranking:
    """The ranking objective: a softmax likelihood of the items that users choose from the whole catalogue.

        loss = -mean_u sum_j w_uj log softmax(scores of u over all items but the support)_j / sum_j w_uj

    j runs over the query positives of user u. The weight is w_uj = p_uj^(focus n / (n + 50)), with n support positives
    and the softmax probability p_uj held constant. For users with a long support, positives that will not come near the
    top of the list count less, as in nDCG; for users with a short one, all positives count about equally.

    For strategies with `prefixes` on ordered histories, u runs over all positions of all histories instead; the next
    item is the only positive, and the softmax runs over all items.

    Attributes:
      sample: number of items in the softmax, sampled once a step for the whole batch, with a correction by the log of
        their sampling probabilities. None: all items if the catalogue has at most `FULL` items and the batch at most
        `CELLS` scores, else 2,048.
      by: sampling distribution: "uniform", "popularity", or "batch" (the query items of the other users).
      focus: exponent of the weights for long supports; 0 is the plain log-likelihood.
      short: share of training users whose support is cut to a log-uniform random length, or to nothing. At 0,
        recommendations without a history are not trained.
      dislikes: share of training users whose support includes interactions below the threshold.
      unknown: share of users and items whose identity is hidden in a step, to train the embeddings of unknown ones.
      folds: number of folds for cross-fitting: closed-form parts are fitted to the users of the other folds. Of more
        than 131,072 training users, 16,384 are one fold, and only they are drawn.
      query: largest number of query positives of a training user.

    Example:
      >>> objective = mr.Ranking(sample=256, by="popularity")  # for metarec_jax.train(data, objective=objective)
      >>> objective.sample, objective.focus
      (256, 0.8)

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
            raise ValueError(f'by is one of "uniform", "popularity", "batch"; got {self.by!r}')
        if (self.sample is not None and self.sample < 1) or self.focus < 0 or self.folds < 2 or self.query < 1:
            raise ValueError(f"need sample >= 1, focus >= 0, folds >= 2 and query >= 1, got {self}")
        if not all(0 <= share <= 1 for share in (self.short, self.dislikes, self.unknown)):
            raise ValueError(f"short, dislikes and unknown are shares from 0 to 1, got {self}")
