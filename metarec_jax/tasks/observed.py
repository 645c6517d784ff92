"""Observed: the training users' interactions as arrays and sparse matrices, for closed-form learners."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.schema import ITEM, ITEM_ID, STATISTICS, prefixed
from metarec_jax.tasks.splits import Histories, sort_within
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target


class Observed(NamedTuple):
    """Interactions of the training users.

    Attributes:
      user, item: `[interactions]` rows: users from 0, items as in the catalogue. Each user's interactions are in order
        of time.
      grade: `[interactions]` float32 from 0 (the lowest rating) to 1, see `Target.grade`.
      positive: `[interactions]` bool.
      features: item features, including "item_id", each `[rows, ...]`; row 0 is the unknown item.
      profile: encoded user attributes, each `[users, ...]`.
      users: number of users.
    """

    user: np.ndarray
    item: np.ndarray
    grade: np.ndarray
    positive: np.ndarray
    features: dict[str, np.ndarray]
    profile: dict[str, np.ndarray]
    users: int

    @property
    def items(self) -> int:
        """Number of catalogue rows."""
        return len(self.features[ITEM_ID])

    def confidences(self) -> sp.csr_matrix:
        """Return the sparse matrix `[users, items]` of grades; interactions below the threshold count, too."""
        matrix = sp.csr_matrix((self.grade, (self.user, self.item)), shape=(self.users, self.items))
        matrix.eliminate_zeros()
        return matrix

    def positives(self) -> sp.csr_matrix:
        """Return the sparse binary matrix `[users, items]` of positive interactions."""
        one = np.ones(int(self.positive.sum()), np.float32)
        kept = self.user[self.positive], self.item[self.positive]
        matrix = sp.csr_matrix((one, kept), shape=(self.users, self.items))
        matrix.data[:] = 1
        return matrix

    def of(self, users: np.ndarray) -> "Observed":
        """Select users; the catalogue stays the same."""
        row = np.full(self.users, -1, np.int32)
        row[users] = np.arange(len(users))
        kept = row[self.user] >= 0
        profile = {name: table[users] for name, table in self.profile.items()}
        item, grade, positive = (x[kept] for x in (self.item, self.grade, self.positive))
        return Observed(row[self.user[kept]], item, grade, positive, self.features, profile, len(users))


def observe(histories: Histories, target: Target) -> Observed:
    """Gather the interactions of some users for closed-form learners.

    Args:
      histories: training users; duplicate users count once.
      target: mapping of ratings to targets.
    """
    data = histories.data
    users, first = np.unique(histories.users, return_index=True)
    part = histories.take(first)
    owner = np.repeat(np.arange(len(users), dtype=np.int32), part.lengths)
    index = part.index[sort_within(part.starts, data.order[part.index])]
    rating = data.rating[index]
    return Observed(
        owner,
        data.item[index],
        target.grade(rating).astype(np.float32),
        rating >= target.threshold,
        item_features(data),
        {name: table[users] for name, table in data.user_features.items()},
        len(users),
    )


def item_features(data: Dataset, statistics: ItemStatistics | None = None) -> dict[str, np.ndarray]:
    """Return the features of all items, including "item_id", each `[rows, ...]`.

    Args:
      data: the dataset.
      statistics: compute the item field of `ItemStatistics` from these, replacing the one in the data.
    """
    features = {ITEM_ID: np.arange(len(data.items), dtype=np.int32)} | prefixed(ITEM, data.item_features)
    if statistics is not None:
        features[ITEM + STATISTICS] = statistics.extend(data).item_features[STATISTICS]
    return features
