"""Splits: which users meta-train, which validate and which test, as a protocol that is a value."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError

Kind = Literal["click", "rating", "ranking"]  # what a protocol's `target` may be
KINDS = get_args(Kind)


@dataclass(frozen=True, eq=False)
class Histories:
    """Some users of a dataset, each with all interactions, in the order in which tasks take them.

    A task's query is a user's first interactions, its support the ones that follow, so that support sets of
    several sizes are nested and share one query.

    Attributes:
      data: the dataset.
      users: `[n]` user rows.
      starts: `[n + 1]`; user `i` has the interactions `index[starts[i]:starts[i + 1]]`.
      index: `[interactions]` positions in the dataset's arrays.
      ordered: each user's interactions are there from the latest to the first, and tasks keep that order: support
        before query, also in training.
      queries: `[n]` how many of each user's first interactions are its query; None: as many as the caller asks for.
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
        """`[n]` interactions of each user."""
        return np.diff(self.starts)

    @classmethod
    def of(cls, data: Dataset, users: np.ndarray, keep: np.ndarray | None = None) -> "Histories":
        """The histories of these user rows, in the dataset's order; of all interactions, or of those to `keep`
        (`[interactions]` bool)."""
        order = np.argsort(data.user, kind="stable")
        order = order if keep is None else order[keep[order]]
        bounds = np.searchsorted(data.user[order], np.arange(len(data.users) + 1))
        return cls(data, np.arange(len(data.users)), bounds, order).take(np.asarray(users))

    def take(self, positions: np.ndarray, most: int | None = None) -> "Histories":
        """The users at these positions, each with its interactions, or with the first `most` of them, in the same
        order; `queries` are cut to `most` as well."""
        length = self.lengths[positions] if most is None else np.minimum(self.lengths[positions], most)
        starts = np.concatenate([[0], np.cumsum(length)]).astype(int)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], length)
        index = self.index[np.repeat(self.starts[positions], length) + within]
        queries = None if self.queries is None else np.minimum(self.queries[positions], length)
        return replace(self, users=self.users[positions], starts=starts, index=index, queries=queries)

    def latest_first(self) -> "Histories":
        """The same users, each with its interactions from the latest to the first, as tasks in time take them.

        Raises:
          ValueError: the histories have `queries`.
        """
        return self._sorted(-self.data.order[self.index], ordered=True)

    def shuffled(self, rng: np.random.Generator) -> "Histories":
        """The same users, each with its interactions in random order.

        Raises:
          ValueError: the histories have `queries`.
        """
        return self._sorted(rng.random(len(self.index)))

    def _sorted(self, key: np.ndarray, **changes: Any) -> "Histories":
        """The same users, each with its interactions by ascending `key` `[interactions]`."""
        if self.queries is not None:
            raise ValueError(
                "these histories say how many of the first interactions are a user's query (`queries`), and another "
                "order would mix query and support; drop the counts first: dataclasses.replace(histories, queries=None)"
            )
        owner = np.repeat(np.arange(len(self)), self.lengths)
        return replace(self, index=self.index[np.lexsort((key, owner))], **changes)


class Split(NamedTuple):
    """Tasks that meta-train, validate and test; with `ColdUsers` no user is in two of them."""

    train: Histories
    validation: Histories
    test: Histories


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Raise a ValueError unless `fractions` are three shares that sum to 1."""
    if len(fractions) != 3 or min(fractions) < 0 or not abs(sum(fractions) - 1) <= 1e-6:
        raise ValueError(f"fractions must be three shares that sum to 1, got {fractions}")


def divide(users: np.ndarray, fractions: tuple[float, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Permute `users` and cut them into three parts of these `fractions`."""
    return np.split(rng.permutation(users), np.round(np.cumsum(fractions[:2]) * len(users)).astype(int))


@dataclass(frozen=True)
class ColdUsers:
    """The cold-user protocol: tasks are users never seen in training (as RecBole-MetaRec does it).

    Users with `minimum` to `maximum` interactions are split at random into train, validation and test; in
    each task `query` random interactions are judged and the rest is the support set.

    Attributes:
      minimum, maximum: interactions that a user must have to be split.
      query: size of the query set.
      fractions: train, validation, test; they sum to 1.
      target: "click" (1 where the rating is at least `threshold`, else 0), "rating", or "ranking" (the clicks of the
        query are to be found among all items).
      threshold: the lowest rating that counts as a click.
      train_on: "window" trains on the split's training users only; "all" adds every user outside the window
        (those with at least two interactions), who are never validation or test users.
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
            raise ValueError(f'target is "click", "rating" or "ranking", train_on "window" or "all"; got {self}')

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split the users of a dataset; the same seed gives the same split and the same queries.

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
