"""Splits: training, validation and test users, and the cold-user protocol."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError

Kind = Literal["click", "rating", "ranking"]  # a protocol's `target`
KINDS = get_args(Kind)
SORTED = 1 << 16  # interactions sorted at once


@dataclass(frozen=True, eq=False)
class Histories:
    """Some users of a dataset and their interactions, in the order in which tasks use them.

    The query of a task is a user's first interactions, the support those that follow. Support sets of several sizes are
    therefore nested and share one query.

    Attributes:
      data: the dataset.
      users: `[n]` user rows.
      starts: `[n + 1]` offsets: user `i` has the interactions `index[starts[i]:starts[i + 1]]`.
      index: `[interactions]` positions in the dataset's arrays.
      ordered: whether each user's interactions are sorted latest first. Tasks keep that order, also in training: every
        support precedes its query in time.
      queries: `[n]` query size of each user; None: the caller chooses.

    Example:
      >>> data = mr.data.from_tables({"user_id": [1, 1, 2], "item_id": [7, 8, 9], "timestamp": [10, 20, 30]})
      >>> histories = mr.tasks.Histories.of(data, np.array([1, 2]))  # rows of the users
      >>> histories.lengths
      array([2, 1])
      >>> data.items.decode(data.item[histories.latest_first().index])
      array([8, 7, 9])
    """

    data: Dataset
    users: np.ndarray
    starts: np.ndarray
    index: np.ndarray
    ordered: bool = False
    queries: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> np.ndarray:
        """Number of interactions of each user, `[n]`."""
        return np.diff(self.starts)

    @classmethod
    def of(cls, data: Dataset, users: np.ndarray, keep: np.ndarray | None = None) -> "Histories":
        """Build the histories of user rows, in the dataset's order.

        Args:
          data: the dataset.
          users: `[n]` user rows.
          keep: `[interactions]` bool mask of the interactions to use (default: all).
        """
        sorted_ = (data.user[1:] >= data.user[:-1]).all()
        order = np.arange(len(data.user)) if sorted_ else np.argsort(data.user, kind="stable")
        order = order if keep is None else order[keep[order]]
        counts = np.bincount(data.user if keep is None else data.user[keep], minlength=len(data.users))
        bounds = np.concatenate([[0], np.cumsum(counts)])
        return cls(data, np.arange(len(data.users)), bounds, order).take(np.asarray(users))

    def take(self, positions: np.ndarray, most: int | None = None) -> "Histories":
        """Select users by position.

        Args:
          positions: positions in these histories.
          most: keep each user's first `most` interactions (default: all); `queries` are cut as well.
        """
        length = self.lengths[positions] if most is None else np.minimum(self.lengths[positions], most)
        starts = np.concatenate([[0], np.cumsum(length)]).astype(int)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], length)
        index = self.index[np.repeat(self.starts[positions], length) + within]
        queries = None if self.queries is None else np.minimum(self.queries[positions], length)
        return replace(self, users=self.users[positions], starts=starts, index=index, queries=queries)

    def latest_first(self) -> "Histories":
        """Sort each user's interactions latest first, as time-ordered tasks need.

        Raises:
          ValueError: the histories have `queries`.
        """
        return self._sorted(-self.data.order[self.index], ordered=True)

    def shuffled(self, rng: np.random.Generator) -> "Histories":
        """Shuffle each user's interactions.

        Raises:
          ValueError: the histories have `queries`.
        """
        return self._sorted(rng.random(len(self.index)))

    def _sorted(self, key: np.ndarray, **changes: Any) -> "Histories":
        """Sort each user's interactions by ascending `key` `[interactions]`."""
        if self.queries is not None:
            raise ValueError(
                "these histories have query sizes (`queries`), which count each user's first interactions; another "
                "order would mix query and support; drop the counts first: dataclasses.replace(histories, queries=None)"
            )
        return replace(self, index=self.index[sort_within(self.starts, key)], **changes)


def sort_within(starts: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return positions `[n]` that sort each span `starts[i]:starts[i + 1]` by ascending `key` `[n]`.

    Spans are sorted in blocks, which is faster than all at once and takes less memory.
    """
    order = np.empty(len(key), np.int64)
    first = 0
    while first < len(starts) - 1:
        last = max(int(np.searchsorted(starts, starts[first] + SORTED, side="right")) - 1, first + 1)
        span = slice(starts[first], starts[last])
        owner = np.repeat(np.arange(last - first), np.diff(starts[first : last + 1]))
        order[span] = starts[first] + np.lexsort((key[span], owner))
        first = last
    return order


class Split(NamedTuple):
    """Training, validation and test tasks; with `ColdUsers` their users are disjoint.

    Example:
      >>> split = mr.ColdUsers().split(mr.data.synthetic(users=30, items=40))
      >>> {name: len(histories) for name, histories in split._asdict().items()}
      {'train': 24, 'validation': 3, 'test': 3}
    """

    train: Histories
    validation: Histories
    test: Histories


def everything(split: Split) -> Histories:
    """Build the training histories of all users of a split.

    If training users are in no other part, every user has all interactions; otherwise, the interactions of all parts.
    """
    train, others = split.train, np.union1d(split.validation.users, split.test.users)
    data, kept = train.data, np.zeros(len(train.data.rating), bool)
    for part in split:
        kept[part.index] = True
    disjoint = not len(np.intersect1d(train.users, others))
    whole = Histories.of(data, np.union1d(train.users, others), None if disjoint else kept)
    return whole.latest_first() if train.ordered else whole


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Validate that `fractions` are three shares that sum to 1; raise `ValueError` otherwise."""
    if len(fractions) != 3 or min(fractions) < 0 or not abs(sum(fractions) - 1) <= 1e-6:
        raise ValueError(f"fractions must be three shares that sum to 1, got {fractions}")


def divide(users: np.ndarray, fractions: tuple[float, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle `users` and cut them into three parts by `fractions`."""
    return np.split(rng.permutation(users), np.round(np.cumsum(fractions[:2]) * len(users)).astype(int))


@dataclass(frozen=True)
class ColdUsers:
    """The cold-user protocol: test users are never seen in training (as in RecBole-MetaRec).

    Users with `minimum` to `maximum` interactions are split at random into train, validation and test. In each task
    `query` random interactions are the query set and the rest is the support set.

    Attributes:
      minimum, maximum: range of interactions of the users that are split.
      query: query size.
      fractions: train, validation and test shares; they sum to 1.
      target: "click" (1 where the rating is at least `threshold`, else 0), "rating", or "ranking" (find the clicks of
        the query among all items).
      threshold: lowest rating that is a click.
      train_on: "window" trains on the split's training users only; "all" adds all users outside the window with at
        least two interactions.

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> train, validation, test = mr.ColdUsers(query=5).split(data)
      >>> len(train), len(validation), len(test)
      (24, 3, 3)
      >>> np.intersect1d(train.users, test.users).size  # test users are new
      0
    """

    minimum: int = 13
    maximum: int = 100
    query: int = 10
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    target: Kind = "click"
    threshold: float = 4.0
    train_on: Literal["window", "all"] = "window"

    def __post_init__(self) -> None:
        if not 1 <= self.query < self.minimum <= self.maximum:
            raise ValueError(
                "need 1 <= query < minimum <= maximum, so that every user has a support set; got "
                f"query={self.query}, minimum={self.minimum}, maximum={self.maximum}"
            )
        check_fractions(self.fractions)
        if self.target not in KINDS or self.train_on not in ("window", "all"):
            raise ValueError(f'target must be "click", "rating" or "ranking", train_on "window" or "all"; got {self}')

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split the users of a dataset; the same seed gives the same split and queries.

        Raises:
          DataError: too few users have `minimum` to `maximum` interactions.
        """
        rng = np.random.default_rng(seed)
        counts = np.bincount(data.user, minlength=len(data.users))
        window = np.flatnonzero((counts >= self.minimum) & (counts <= self.maximum))
        parts = divide(window, self.fractions, rng)
        if any(len(part) == 0 for part in parts):
            raise DataError(
                f"{data.name}: {len(window)} users have {self.minimum} to {self.maximum} interactions, too "
                f"few to split into {self.fractions}; widen the window (ColdUsers(minimum=..., maximum=..., "
                f"query=...)). A user needs more than the {self.query} interactions of a query."
            )
        train, validation, test = parts
        if self.train_on == "all":
            outside = (counts >= 2) & ((counts < self.minimum) | (counts > self.maximum))
            train = np.concatenate([train, np.flatnonzero(outside)])
        return Split(*(Histories.of(data, part).shuffled(rng) for part in (train, validation, test)))
