"""Popularity: how many training users rated an item, as a dense field that new items have too (their count is 0)."""

from dataclasses import replace

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.splits import Histories

NAME = "popularity"


def with_popularity(train: Histories) -> Dataset:
    """The histories' dataset with the item field `popularity`, log(1 + number of training users who rated the item).

    Counts come from the training users alone: nothing of validation or test users can leak through them.
    """
    data = train.data
    count = np.bincount(data.item[train.index], minlength=len(data.items))
    field = Field.fit(NAME, np.log1p(count[1:]))
    table = np.zeros((len(data.items), 1), np.float32)
    table[:] = field.encode(np.log1p(count))
    return replace(data, item_fields=(*data.item_fields, field), item_features={**data.item_features, NAME: table})
