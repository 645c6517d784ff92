"""Dataset: cleaned interactions with integer user and item rows, and their encoded attributes."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from metarec_jax.data.fields import Field
from metarec_jax.data.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions of users with items, and the encoded attributes of both.

    Readers return it and protocols split it. Row 0 of users and of items stands for an unknown user or item.

    Attributes:
      name: the name in reports.
      user, item: `[interactions]` int32 rows in `users` and `items`; never 0.
      rating: `[interactions]` float32.
      timestamp: `[interactions]` int64 seconds since 1970; 0 where unknown.
      users, items: vocabularies that map raw ids to rows.
      user_fields, item_fields: encoders of the attributes.
      user_features, item_features: encoded attributes by field name, each `[rows, ...]`.
      context_fields: encoders of the context of an interaction (device, hour).
      context_features: encoded contexts by field name, each `[interactions, ...]`.
      titles: `[item rows]` display names, or None.
      report: counts of the rows that cleaning touched.
      truth: `[user rows, item rows]` expected ratings; synthetic data only.

    Example:
      >>> data = mr.data.from_tables({"user_id": ["ann", "ann", "bob"], "item_id": ["tea", "rye", "tea"]}, name="shop")
      >>> data
      Dataset(shop: 3 interactions, 2 users, 2 items)
      >>> data.item, data.items.ids  # row 1 is rye, row 2 is tea
      (array([2, 1, 2], dtype=int32), array(['rye', 'tea'], dtype='<U3'))
    """

    name: str
    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    timestamp: np.ndarray
    users: Vocabulary
    items: Vocabulary
    user_fields: tuple[Field, ...] = ()
    user_features: dict[str, np.ndarray] = field(default_factory=dict)
    item_fields: tuple[Field, ...] = ()
    item_features: dict[str, np.ndarray] = field(default_factory=dict)
    context_fields: tuple[Field, ...] = ()
    context_features: dict[str, np.ndarray] = field(default_factory=dict)
    titles: np.ndarray | None = None
    report: dict[str, int] = field(default_factory=dict)
    truth: np.ndarray | None = None

    @cached_property
    def by_user(self) -> np.ndarray:
        """Indices `[interactions]` that sort by user, then by time, then by row."""
        step, later = np.diff(self.user), self.timestamp[1:] >= self.timestamp[:-1]
        if ((step > 0) | ((step == 0) & later)).all():  # sorted already, as `Prepared.dataset` is
            return np.arange(len(self.user), dtype=np.int32)
        return np.lexsort((self.timestamp, self.user))

    @cached_property
    def order(self) -> np.ndarray:
        """Number `[interactions]` int32 of earlier interactions of the same user (by time, then by row)."""
        counts = np.bincount(self.user, minlength=len(self.users))
        order = np.empty(len(self.user), np.int32)
        order[self.by_user] = np.arange(len(self.user)) - np.repeat(np.cumsum(counts) - counts, counts)
        return order

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name}: {len(self.rating):,} interactions, {len(self.users) - 1:,} users, "
            f"{len(self.items) - 1:,} items)"
        )
