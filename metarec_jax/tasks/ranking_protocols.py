"""Ranking protocols: find a user's held-out positives among all items of the catalogue."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError
from metarec_jax.tasks.splits import Histories, Kind, Split, check_fractions, divide


def positive(data: Dataset, threshold: float | None) -> np.ndarray:
    """Return a mask `[interactions]` of the positive interactions, those rated at least `threshold`.

    Every interaction is positive if `threshold` is None or all ratings of the dataset are equal: such data (plays,
    purchases) are positive-only.
    """
    if threshold is None or (data.rating == data.rating[:1]).all():
        return np.ones(len(data.rating), bool)
    return data.rating >= threshold


@dataclass(frozen=True)
class StrongGeneralisation:
    """Strong generalisation: predict held-out positives of users never seen in training.

    Users with at least `minimum` positives are split at random into train, validation and test. For validation and test
    users, a random share `held_out` of the positives, at least one, is the query; the other positives, at least one,
    are the support. Training users keep all their interactions, positive or not; training draws its own queries.

    Attributes:
      threshold: lowest positive rating; ignored if all ratings are equal (see `positive`).
      minimum: positives that a user must have to be split.
      held_out: share of a user's positives in the query.
      fractions: train, validation and test shares; they sum to 1.
      fold_ins: random draws of query and support for each validation and test user; the rows of a user are consecutive.
      dislikes: append the user's interactions below `threshold` to the support set. Support sizes count from the front:
        up to the number of positives, they still contain positives only.
      target: "ranking".

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> train, validation, test = mr.StrongGeneralisation(threshold=3.5).split(data)
      >>> len(train), len(validation), len(test)
      (22, 3, 3)
      >>> test.lengths, test.queries  # positives of each test user, and how many of them are held out
      (array([10, 15, 17]), array([2, 3, 3]))

    References:
      Liang et al., Variational Autoencoders for Collaborative Filtering, WWW 2018, section 4.
    """

    threshold: float = 4.0
    minimum: int = 5
    held_out: float = 0.2
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    fold_ins: int = 1
    dislikes: bool = False
    target: ClassVar[Kind] = "ranking"
    query: ClassVar[int] = 10  # for histories without `queries`, as in StrongRatings

    def __post_init__(self) -> None:
        if not (self.minimum >= 2 and 0 < self.held_out < 1 and self.fold_ins >= 1):
            raise ValueError(f"need minimum >= 2, 0 < held_out < 1 and fold_ins >= 1, got {self}")
        check_fractions(self.fractions)

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split the users of a dataset.

        The same seed gives the same split and queries, with or without `dislikes`.

        Raises:
          DataError: too few users have `minimum` positives.
        """
        rng = np.random.default_rng(seed)
        liked = positive(data, self.threshold)
        counts = np.bincount(data.user[liked], minlength=len(data.users))
        chosen = np.flatnonzero(counts >= self.minimum)
        parts = divide(chosen, self.fractions, rng)
        if any(len(part) == 0 for part in parts):
            raise DataError(
                f"{data.name}: {len(chosen)} of {len(data.users) - 1} users have {self.minimum} positives (ratings of "
                f"{self.threshold:g} or more), too few to split into {self.fractions}; lower threshold or minimum "
                "(StrongGeneralisation(threshold=..., minimum=...))"
            )
        train = Histories.of(data, parts[0]).shuffled(rng)
        positives = [Histories.of(data, np.repeat(part, self.fold_ins), liked).shuffled(rng) for part in parts[1:]]
        tasks = [replace(part, queries=self._queries(part.lengths)) for part in positives]
        if self.dislikes:
            tasks = [_joined(part, Histories.of(data, part.users, ~liked).shuffled(rng)) for part in tasks]
        return Split(train, *tasks)

    def _queries(self, positives: np.ndarray) -> np.ndarray:
        """Return the query sizes for numbers of positives; at least one positive remains for the support."""
        return np.clip(np.round(self.held_out * positives).astype(int), 1, positives - 1)


@dataclass(frozen=True)
class NextItem:
    """Leave-one-out: predict each user's last positive in time from those before it.

    The query of a test task is a user's last positive, that of a validation task the one before it. The support set is
    the history before the query, latest first: smaller support sets are the most recent part of larger ones. Training
    tasks hold the history before both queries. Every user with `minimum` positives is in all three parts, so test users
    are known in training. Ties in time are in row order; without timestamps, row order is time order. The split does
    not depend on the seed.

    Attributes:
      threshold: lowest positive rating (see `positive`); lower ratings are dropped. None: every interaction is
        positive.
      minimum: positives that a user must have; at least 3, one for each part.
      maximum: number of latest interactions that a task keeps.
      target: "ranking".

    Example:
      >>> plays = {"user_id": [1] * 4, "item_id": ["tea", "rye", "oil", "jam"], "timestamp": [1, 2, 3, 4]}
      >>> data = mr.data.from_tables(plays)
      >>> train, validation, test = mr.NextItem().split(data)
      >>> data.items.decode(data.item[test.index]).tolist()  # latest first: the query, then the support
      ['jam', 'oil', 'rye', 'tea']
      >>> data.items.decode(data.item[train.index]).tolist()
      ['rye', 'tea']

    References:
      Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, section IV.
    """

    threshold: float | None = None
    minimum: int = 3
    maximum: int = 500
    target: ClassVar[Kind] = "ranking"
    query: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (self.minimum >= 3 and self.maximum >= 2):
            raise ValueError(f"need minimum >= 3, one positive for each part, and maximum >= 2, got {self}")

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split each user's interactions in time; `seed` has no effect.

        Raises:
          DataError: no user has `minimum` positives.
        """
        known = positive(data, self.threshold)
        counts = np.bincount(data.user[known], minlength=len(data.users))
        users = np.flatnonzero(counts >= self.minimum)
        if not len(users):
            raise DataError(
                f"{data.name}: none of {len(data.users) - 1} users has {self.minimum} positives, the most is "
                f"{counts.max()}; lower threshold, or minimum to 3 at the least (NextItem(threshold=..., minimum=...))"
            )
        everyone, parts = np.arange(len(users)), []
        for _ in range(3):  # test, validation, train: each without the query of the one before
            part = Histories.of(data, users, known).latest_first()
            known[part.take(everyone, 1).index] = False
            parts.append(part.take(everyone, self.maximum))
        test, validation, train = parts
        one = np.ones(len(users), int)
        return Split(train, replace(validation, queries=one), replace(test, queries=one))


@dataclass(frozen=True)
class StrongRatings(StrongGeneralisation):
    """Rating prediction for the users of `StrongGeneralisation`.

    Training users and their interactions are the same. For a validation or test user, 10 random interactions, positive
    or not, are the query and the others the support.

    Attributes:
      target: "rating".
    """

    target: ClassVar[Kind] = "rating"

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split users as `StrongGeneralisation` does; the same seed gives the same users and queries.

        Raises:
          DataError: too few users have `minimum` positives.
        """
        train, *evaluated = super().split(data, seed)
        rng = np.random.default_rng([seed, 1])
        return Split(train, *(Histories.of(data, np.unique(part.users)).shuffled(rng) for part in evaluated))


@dataclass(frozen=True)
class NextRating(NextItem):
    """Rating prediction for the users of `NextItem`.

    Training has the history before both queries, positive or not. The query is the rating of a user's last positive; in
    validation, of the positive before it. The support set is the history before the query, latest first.

    Attributes:
      target: "rating".
    """

    target: ClassVar[Kind] = "rating"

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split each user's interactions at the queries of `NextItem`.

        Raises:
          DataError: no user has `minimum` positives.
        """
        _, validation, test = super().split(data, seed)
        earlier, last = (self._moments(data, part) for part in (validation, test))
        parts = [
            Histories.of(data, test.users, kept).latest_first().take(np.arange(len(test)), self.maximum)
            for kept in (data.order < earlier, data.order <= earlier, data.order <= last)
        ]
        one = np.ones(len(test), int)
        return Split(parts[0], *(replace(part, queries=one) for part in parts[1:]))

    def _moments(self, data: Dataset, part: Histories) -> np.ndarray:
        """Return for each interaction `[interactions]` the time order of its user's query; -1 for other users."""
        place = np.full(len(data.users), -1)
        place[part.users] = data.order[part.index[part.starts[:-1]]]
        return place[data.user]


def _joined(first: Histories, more: Histories) -> Histories:
    """Append to each history of `first` the interactions of the same user in `more`."""
    owner = np.concatenate([np.repeat(np.arange(len(part)), part.lengths) for part in (first, more)])
    index = np.concatenate([first.index, more.index])[np.argsort(owner, kind="stable")]
    return replace(first, starts=first.starts + more.starts, index=index)
