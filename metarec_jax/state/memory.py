"""Memory: encode known users from the dataset and the store."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError
from metarec_jax.inference.predictor import EncodedUser, Predictor
from metarec_jax.state.events import Store, Stored, UserId
from metarec_jax.state.feedback import taste

EVENTS = 1 << 20  # events read per user: many, so that items seen long ago are excluded too


class Memory(NamedTuple):
    """Known users by their raw ids.

    An interaction has its context in the dataset or in the store.

    Attributes:
      store: events of users since the training.
      half_life: half-life of an event's weight in seconds, counted back from its user's latest event; None: no decay.
    """

    store: Store
    half_life: float | None = None

    def users(self, predictor: Predictor, ids: Sequence[UserId]) -> list[EncodedUser]:
        """Encode users; interactions in the dataset come before events in the store."""
        trained, catalogue, encoded = predictor.trained, predictor.catalogue, []
        for user, stored in zip(ids, self.store.read(ids, EVENTS), strict=True):
            row = _row(catalogue, user)
            try:
                events = _interactions(catalogue, row) + _encoded(catalogue.context_fields, stored.events)
                events, ratings, weights = taste(events, trained.limits, trained.target.threshold, self.half_life)
                attributes = predictor.attributes(stored.attributes)
                if row != UNKNOWN and not stored.attributes:
                    attributes = {name: table[row] for name, table in catalogue.user_features.items()}
                rows = predictor.stock.encode([event.item for event in events])
                encoded.append(EncodedUser(rows, ratings, weights, attributes, _contexts(catalogue, events)))
            except DataError as error:
                raise DataError(f"user {user!r} in the store: {error}") from error
        return encoded


def _row(data: Dataset, user: UserId) -> int:
    """Return a user's row in the dataset; 0 if unknown or if the dataset holds no interactions."""
    vocabulary = data.users
    same_type = vocabulary.ids.dtype.kind == ("U" if isinstance(user, str) else "i")
    if not len(data.rating) or vocabulary.buckets is not None or not same_type:
        return UNKNOWN
    return int(vocabulary.encode([user])[0])


def _interactions(data: Dataset, row: int) -> list[Stored]:
    """Return a user's interactions in the dataset, in order of time, with encoded contexts."""
    if row == UNKNOWN:
        return []
    span = np.searchsorted(data.user, np.array([row, row + 1], data.user.dtype), sorter=data.by_user)
    index = data.by_user[slice(*span)]
    items = data.items.decode(data.item[index]).tolist()
    contexts = [{name: values[i] for name, values in data.context_features.items()} for i in index]
    interactions = zip(items, data.rating[index].tolist(), data.timestamp[index].tolist(), contexts, strict=True)
    return [Stored(item, "rating", rating, float(time), context) for item, rating, time, context in interactions]


def _encoded(fields: Sequence[Field], events: list[Stored]) -> list[Stored]:
    """Encode the contexts of stored events; fields that the model does not have are left out."""
    given = [event.context for event in events if event.context]
    columns = {f.name: f.encode([context.get(f.name) for context in given]) for f in fields if given}
    rows = iter(range(len(given)))

    def encode(event: Stored) -> Stored:
        if not event.context:
            return event
        row = next(rows)
        return event._replace(context={name: column[row] for name, column in columns.items()})

    return [encode(event) for event in events]


def _contexts(data: Dataset, events: Sequence[Stored]) -> dict[str, np.ndarray]:
    """Return the encoded contexts of events, each `[events, ...]`; those of events without one are unknown."""
    if not events:
        return {}
    return {
        f.name: np.stack([f.unknown() if event.context is None else event.context[f.name] for event in events])
        for f in data.context_fields
    }
