"""Item statistics: shrunk item means of the training users' targets, as a dense item field."""

from dataclasses import dataclass, replace

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.schema import STATISTICS
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

SHRINK = 5.0  # pseudo-count in the denominator of an item's mean


@dataclass(frozen=True, eq=False)
class ItemStatistics:
    """Statistics of each item as a dense field: shrunk mean targets and log(1 + count), standardised.

    Means and counts are over the training users. Unknown and new items have the field, too. For a training user the
    user's own interactions with an item are excluded (`without`). Otherwise the field would leak, in training only, the
    user's rating of a rarely rated item.

    Attributes:
      target: mapping of ratings to the `values` that are averaged: click and grade, or the rating.
      total: `[items, values]` sum of (value - mean).
      count: `[items]` number of training interactions.
      mean: `[values]` means over the training users' interactions.
      field: the dense field of width `values + 1`.
      pairs: if a task has an item more than once (see `by_key`), three arrays over the distinct pairs: sorted keys user
        * items + item, sum of (value - mean) `[pairs, values]`, and count. Otherwise None.

    Example:
      The mean rating is 3. The ratings of item 7, 5 and 3, sum to 2 above it, that of item 8 to 2 below it:

      >>> data = mr.data.from_tables({"user_id": [1, 2, 1], "item_id": [7, 7, 8], "rating": [5, 3, 1]})
      >>> train = mr.tasks.Histories.of(data, np.array([1, 2]))
      >>> statistics = mr.tasks.ItemStatistics.fit(train, mr.tasks.Target("rating"))
      >>> statistics.mean, statistics.total[:, 0], statistics.count  # the first row is the unknown item
      (array([3.]), array([ 0.,  2., -2.]), array([0., 2., 1.]))
      >>> [field.name for field in statistics.extend(data).item_fields]
      ['training statistics']
    """

    target: Target
    total: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    field: Field
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @classmethod
    def fit(cls, train: Histories, target: Target) -> "ItemStatistics":
        """Fit the statistics on training users only, so that validation and test users cannot leak."""
        data, values = train.data, target.values(train.data.rating[train.index]).astype(float)
        items, mean = data.item[train.index], values.mean(0)
        total = _sums(items, values - mean, len(data.items))
        count = np.bincount(items, minlength=len(data.items)).astype(float)
        field = Field.fit(STATISTICS, _raw(total, count)[1:])
        key, pairs = data.user[train.index] * np.int64(len(data.items)) + items, None
        if (np.diff(np.sort(key)) == 0).any():
            pair, place, times = np.unique(key, return_inverse=True, return_counts=True)
            pairs = pair, _sums(place, values - mean, len(pair)), times
        return cls(target, total, count, mean, field, pairs)

    def extend(self, data: Dataset) -> Dataset:
        """Return the dataset with the field added to its items."""
        table = self._standardised(self.total, self.count)
        return replace(
            data,
            item_fields=(*data.item_fields, self.field),
            item_features={**data.item_features, STATISTICS: table},
        )

    def without(self, users: np.ndarray, items: np.ndarray, rating: np.ndarray) -> np.ndarray:
        """Compute the field with each user's own interactions with the item excluded.

        Excludes the one interaction of this rating, or all of the pair if tasks have an item more than once.

        Args:
          users, items: `[...]` rows.
          rating: `[...]` the user's ratings of the items.

        Returns:
          `[..., values + 1]` float32.
        """
        own_total, own_count = self.target.values(rating) - self.mean, np.ones_like(self.count[items])
        if self.pairs is not None:
            pair = users * np.int64(len(self.total)) + items
            place = np.minimum(np.searchsorted(self.pairs[0], pair), len(self.pairs[0]) - 1)
            matching = self.pairs[0][place] == pair
            own_total = np.where(matching[..., None], self.pairs[1][place], 0)
            own_count = np.where(matching, self.pairs[2][place], 0)
        return self._standardised(self.total[items] - own_total, np.maximum(self.count[items] - own_count, 0))

    def _standardised(self, total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return ((_raw(total, count) - self.field.mean) / self.field.scale).astype(np.float32)


def _sums(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """Sum `values` `[n, values]` by `group` `[n]`; `[groups, values]`."""
    return np.stack([np.bincount(group, column, groups) for column in values.T], -1)


def _raw(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.concatenate([total / (count + SHRINK)[..., None], np.log1p(count)[..., None]], -1)
