"""Item statistics: what the training users did with an item, as a dense field that unknown and new items have too."""

from dataclasses import dataclass, replace

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.splits import Histories
from metarec_jax.data.target import Target

NAME = "training statistics"
SHRINK = 5.0  # training users that the prior of an item's mean is worth


@dataclass(frozen=True, eq=False)
class ItemStatistics:
    """Per item: the shrunk mean of the training users' targets, and log(1 + how many rated it), both standardised.

    A training user's own interactions with an item are taken out of what that user sees (`without`). Otherwise the
    field would tell in training, and only there, what the user thought of a rarely rated item.

    Attributes:
      total: `[items]` sum of (target - mean).
      count: `[items]` training users.
      mean: mean target of the training users.
      field: the dense field of width 2.
      pairs: where a task has an item more than once (see `by_key`): sorted user * items + item of the training
        interactions, with the sum of (target - mean) and the count of each.
    """

    total: np.ndarray
    count: np.ndarray
    mean: float
    field: Field
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @classmethod
    def fit(cls, train: Histories, target: Target) -> "ItemStatistics":
        """From the training users alone: nothing of validation or test users can leak through the field."""
        data, values = train.data, target.encode(train.data.rating[train.index]).astype(float)
        items, mean = data.item[train.index], float(values.mean())
        total = np.bincount(items, values - mean, len(data.items))
        count = np.bincount(items, minlength=len(data.items)).astype(float)
        field = Field.fit(NAME, np.stack(_raw(total, count), -1)[1:])
        pair, place, times = np.unique(
            data.user[train.index] * np.int64(len(data.items)) + items, return_inverse=True, return_counts=True
        )
        pairs = (pair, np.bincount(place, values - mean), times) if len(pair) < len(items) else None
        return cls(total, count, mean, field, pairs)

    def extend(self, data: Dataset) -> Dataset:
        """The dataset with the field added to its items."""
        table = self._standardised(self.total, self.count)
        return replace(
            data,
            item_fields=(*data.item_fields, self.field),
            item_features={**data.item_features, NAME: table},
        )

    def without(self, users: np.ndarray, items: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The field `[..., 2]` of item rows `[...]`, each without what its user `[...]` did with the item: the one
        interaction of this target `[...]`, or all of them where tasks have an item more than once."""
        own_total, own_count = target - self.mean, np.ones_like(self.count[items])
        if self.pairs is not None:
            pair = users * np.int64(len(self.total)) + items
            place = np.minimum(np.searchsorted(self.pairs[0], pair), len(self.pairs[0]) - 1)
            found = self.pairs[0][place] == pair
            own_total, own_count = (np.where(found, own[place], 0) for own in self.pairs[1:])
        return self._standardised(self.total[items] - own_total, np.maximum(self.count[items] - own_count, 0))

    def _standardised(self, total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return ((np.stack(_raw(total, count), -1) - self.field.mean) / self.field.scale).astype(np.float32)


def _raw(total: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return total / (count + SHRINK), np.log1p(count)
