"""Item statistics: what the training users did with an item, as a dense field that unknown and new items have too."""

from dataclasses import dataclass, replace

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

NAME = "training statistics"
SHRINK = 5.0  # training users that the prior of an item's mean is worth


@dataclass(frozen=True, eq=False)
class ItemStatistics:
    """Per item: the shrunk means of the training users' targets, and log(1 + how many rated it), all standardised.

    A training user's own interactions with an item are taken out of what that user sees (`without`). Otherwise the
    field would tell in training, and only there, what the user thought of a rarely rated item.

    Attributes:
      target: ratings to the `values` whose means are taken: whether clicked and how much liked, or the rating.
      total: `[items, values]` sum of (value - mean).
      count: `[items]` training users.
      mean: `[values]` of the training users.
      field: the dense field of width `values + 1`.
      pairs: where a task has an item more than once (see `by_key`): sorted user * items + item of the training
        interactions, with the sum of (value - mean) and the count of each.
    """

    target: Target
    total: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    field: Field
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @classmethod
    def fit(cls, train: Histories, target: Target) -> "ItemStatistics":
        """From the training users alone: nothing of validation or test users can leak through the field."""
        data, values = train.data, target.values(train.data.rating[train.index]).astype(float)
        items, mean = data.item[train.index], values.mean(0)
        total = _sums(items, values - mean, len(data.items))
        count = np.bincount(items, minlength=len(data.items)).astype(float)
        field = Field.fit(NAME, _raw(total, count)[1:])
        pair, place, times = np.unique(
            data.user[train.index] * np.int64(len(data.items)) + items, return_inverse=True, return_counts=True
        )
        pairs = (pair, _sums(place, values - mean, len(pair)), times) if len(pair) < len(items) else None
        return cls(target, total, count, mean, field, pairs)

    def extend(self, data: Dataset) -> Dataset:
        """The dataset with the field added to its items."""
        table = self._standardised(self.total, self.count)
        return replace(
            data,
            item_fields=(*data.item_fields, self.field),
            item_features={**data.item_features, NAME: table},
        )

    def without(self, users: np.ndarray, items: np.ndarray, rating: np.ndarray) -> np.ndarray:
        """The field `[..., values + 1]` of item rows `[...]`, each without what its user `[...]` did with the item: the
        one interaction of this rating `[...]`, or all of them where tasks have an item more than once."""
        own_total, own_count = self.target.values(rating) - self.mean, np.ones_like(self.count[items])
        if self.pairs is not None:
            pair = users * np.int64(len(self.total)) + items
            place = np.minimum(np.searchsorted(self.pairs[0], pair), len(self.pairs[0]) - 1)
            found = self.pairs[0][place] == pair
            own_total = np.where(found[..., None], self.pairs[1][place], 0)
            own_count = np.where(found, self.pairs[2][place], 0)
        return self._standardised(self.total[items] - own_total, np.maximum(self.count[items] - own_count, 0))

    def _standardised(self, total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return ((_raw(total, count) - self.field.mean) / self.field.scale).astype(np.float32)


def _sums(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """`[groups, values]` sums of `values` `[n, values]` by `group` `[n]`."""
    return np.stack([np.bincount(group, column, groups) for column in values.T], -1)


def _raw(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.concatenate([total / (count + SHRINK)[..., None], np.log1p(count)[..., None]], -1)
