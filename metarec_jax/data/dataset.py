"""Dataset: cleaned interactions with users and items as dense rows, and the encoded attributes of both."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from metarec_jax.data.fields import Field
from metarec_jax.data.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Dataset:
    """What every reader returns and every protocol splits.

    Attributes:
      name: for reports.
      user, item: `[interactions]` int32 rows in `users` and `items`; never 0.
      rating: `[interactions]` float32.
      timestamp: `[interactions]` int64 seconds, 0 where unknown.
      users, items: raw ids and their rows.
      user_fields, item_fields: how attributes are encoded.
      user_features, item_features: encoded attributes, each `[rows, ...]`; row 0 is the unknown user or item.
      context_fields: how what was around an interaction (device, hour) is encoded.
      context_features: encoded contexts, each `[interactions, ...]`.
      titles: `[item rows]` names to show to people, or None.
      report: what cleaning did, as counts.
      truth: `[user rows, item rows]` expected rating, for synthetic data only.
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
        """`[interactions]` positions of the interactions, user after user, of each in time (else in rows)."""
        return np.lexsort((self.timestamp, self.user))

    @cached_property
    def order(self) -> np.ndarray:
        """`[interactions]` int32: how many of the same user's interactions came before (by time, else by row)."""
        by_user = self.by_user
        first = np.searchsorted(self.user[by_user], self.user[by_user])
        order = np.empty(len(self.user), np.int32)
        order[by_user] = np.arange(len(self.user)) - first
        return order

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name}: {len(self.rating):,} interactions, {len(self.users) - 1:,} users, "
            f"{len(self.items) - 1:,} items)"
        )
