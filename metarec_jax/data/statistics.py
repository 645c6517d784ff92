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

    A training user's own interactions are taken out of what that user sees (`without`). Otherwise the field would tell
    in training, and only there, what the user thought of a rarely rated item.

    Attributes:
      total: `[items]` sum of (target - mean).
      count: `[items]` training users.
      mean: mean target of the training users.
      field: the dense field of width 2.
    """

    total: np.ndarray
    count: np.ndarray
    mean: float
    field: Field

    @classmethod
    def fit(cls, train: Histories, target: Target) -> "ItemStatistics":
        """From the training users alone: nothing of validation or test users can leak through the field."""
        data, values = train.data, target.encode(train.data.rating[train.index]).astype(float)
        items, mean = data.item[train.index], float(values.mean())
        total = np.bincount(items, values - mean, len(data.items))
        count = np.bincount(items, minlength=len(data.items)).astype(float)
        field = Field.fit(NAME, np.stack(_raw(total, count), -1)[1:])
        return cls(total, count, mean, field)

    def extend(self, data: Dataset) -> Dataset:
        """The dataset with the field added to its items."""
        table = self._standardised(self.total, self.count)
        return replace(
            data,
            item_fields=(*data.item_fields, self.field),
            item_features={**data.item_features, NAME: table},
        )

    def without(self, items: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The field `[..., 2]` of item rows `[...]`, each without the one interaction of this target `[...]`."""
        return self._standardised(self.total[items] - (target - self.mean), np.maximum(self.count[items] - 1, 0))

    def _standardised(self, total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return ((np.stack(_raw(total, count), -1) - self.field.mean) / self.field.scale).astype(np.float32)


def _raw(total: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return total / (count + SHRINK), np.log1p(count)
