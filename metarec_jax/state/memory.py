"""Memory: what is known of the users of the dataset and of the store, encoded for the model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError
from metarec_jax.inference.predictor import EncodedUser, Predictor
from metarec_jax.state.events import Store, Stored, UserId
from metarec_jax.state.feedback import taste

EVENTS = 1 << 20  # latest events of a user that are read, so that what was seen long ago is left out too


class Memory(NamedTuple):
    """Users by their raw ids.

    Attributes:
      store: what users did since the training.
      half_life: seconds in which an event loses half its weight, counted back from its user's latest one; None: all
        weigh the same.
    """

    store: Store
    half_life: float | None = None

    def users(self, predictor: Predictor, ids: Sequence[UserId]) -> list[EncodedUser]:
        """The users, encoded: interactions in the dataset come before those in the store."""
        trained, catalogue, encoded = predictor.trained, predictor.catalogue, []
        for user, stored in zip(ids, self.store.read(ids, EVENTS), strict=True):
            row = _row(catalogue, user)
            events = _interactions(catalogue, row) + stored.events
            items, ratings, weights = taste(events, trained.limits, trained.target.threshold, self.half_life)
            try:
                attributes = predictor.attributes(stored.attributes)
                if row != UNKNOWN and not stored.attributes:
                    attributes = {name: table[row] for name, table in catalogue.user_features.items()}
                encoded.append(EncodedUser(predictor.stock.encode(items), ratings, weights, attributes))
            except DataError as error:
                raise DataError(f"user {user!r}, as kept by the store: {error}") from error
        return encoded


def _row(data: Dataset, user: UserId) -> int:
    """The row of a user of the dataset, 0 where there is none or the interactions are not at hand."""
    ids = data.users
    same_type = ids.ids.dtype.kind == ("U" if isinstance(user, str) else "i")
    if not len(data.rating) or ids.buckets is not None or not same_type:
        return UNKNOWN
    return int(ids.encode([user])[0])


def _interactions(data: Dataset, row: int) -> list[Stored]:
    """What a user of the dataset did, in the order of time."""
    if row == UNKNOWN:
        return []
    span = np.searchsorted(data.user, np.array([row, row + 1], data.user.dtype), sorter=data.by_user)
    index = data.by_user[slice(*span)]
    items = data.items.decode(data.item[index]).tolist()
    each = zip(items, data.rating[index].tolist(), data.timestamp[index].tolist(), strict=True)
    return [Stored(item, "rating", rating, float(time)) for item, rating, time in each]
