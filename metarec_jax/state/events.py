"""Events: user events and the interface of their stores."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

VERSION = 2  # of the stores' format; 2 added the context of an event
UserId = int | str


class Event(NamedTuple):
    """An interaction of a user with an item.

    Attributes:
      user, item: raw ids, integers of up to 64 bits or strings.
      kind: "rating", "click", "purchase", "dismiss" (not interested) or "remove" (discard earlier events with the
        item).
      value: the rating; None for other kinds.
      time: seconds since 1970 (default: now).
      id: events of a user with the same id count once (default: a new id).
      context: context of the interaction by field, `{"device": "phone"}`; omitted fields are unknown.

    Example:
      >>> mr.Event(user="ann", item="tea", value=5.0)
      Event(user='ann', item='tea', kind='rating', value=5.0, time=None, id=None, context=None)
    """

    user: UserId
    item: UserId
    kind: str = "rating"
    value: float | None = None
    time: float | None = None
    id: str | None = None
    context: Mapping[str, Any] | None = None


class Stored(NamedTuple):
    """One event of a user as returned by a store, with its context as it was given."""

    item: UserId
    kind: str
    value: float | None
    time: float
    context: Mapping[str, Any] | None = None


class StoredUser(NamedTuple):
    """A stored user: attributes as they were given, and events in order of time."""

    attributes: dict[str, Any]
    events: list[Stored]


class Store(Protocol):
    """Interface of a store of users; every method is atomic and thread-safe."""

    def append(self, *groups: Iterable[Event]) -> list[int]:
        """Store all events durably before returning; return the number of new events of each group."""

    def describe(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Replace a user's attributes."""

    def read(self, users: Sequence[UserId], longest: int) -> list[StoredUser]:
        """Return each user's attributes and latest `longest` events; both are empty for an unseen user."""

    def forget(self, user: UserId) -> int:
        """Delete all data of a user; return the number of deleted events."""

    def evict(self, *, before: float | None = None, users: int | None = None) -> int:
        """Delete inactive users; return their number.

        Args:
          before: delete users whose last event is earlier than this time.
          users: keep at most this many users, the most recently active ones.
        """

    def size(self) -> dict[str, float]:
        """Return `users`, `events`, `bytes` and `bytes_per_user`."""

    def close(self) -> None:
        """Close the file or connection."""
