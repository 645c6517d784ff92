"""Events: what users did, and what a store of them must do."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

VERSION = 1  # of what stores hold
UserId = int | str


class Event(NamedTuple):
    """What a user did with an item.

    Attributes:
      user, item: raw ids, integers of up to 64 bits or strings.
      kind: "rating", "click", "purchase", "dismiss" (not interested) or "remove" (forget what was before).
      value: of a rating.
      time: seconds since 1970 (default: now).
      id: an event of a user that comes again with the same id counts once (default: a new one).
    """

    user: UserId
    item: UserId
    kind: str = "rating"
    value: float | None = None
    time: float | None = None
    id: str | None = None


class Stored(NamedTuple):
    """One event of a user as a store gives it back."""

    item: UserId
    kind: str
    value: float | None
    time: float


class StoredUser(NamedTuple):
    """What a store knows of a user: attributes as they were given, and events in the order of time."""

    attributes: dict[str, Any]
    events: list[Stored]


class Store(Protocol):
    """What `Recommender` needs of a store; every method is atomic and may be called from several threads."""

    def append(self, *groups: Iterable[Event]) -> list[int]:
        """Keeps all events for good before it returns; returns how many of each group were new."""

    def describe(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Keeps a user's attributes, in place of those before."""

    def read(self, users: Sequence[UserId], longest: int) -> list[StoredUser]:
        """What is known of each user, the latest `longest` events at most; nothing of one never seen."""

    def forget(self, user: UserId) -> int:
        """Removes every trace of a user; returns how many events there were."""

    def evict(self, *, before: float | None = None, users: int | None = None) -> int:
        """Forgets users whose last event is before a time, and the longest idle ones beyond so many; returns how
        many."""

    def size(self) -> dict[str, float]:
        """`users`, `events`, `bytes` and `bytes_per_user`."""

    def close(self) -> None:
        """Frees the file or connection."""
