"""Protocols for time-based splits and MeLU's scenarios, and the registry of all protocols."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError
from metarec_jax.tasks.ranking_protocols import NextItem, NextRating, StrongGeneralisation, StrongRatings
from metarec_jax.tasks.splits import KINDS, ColdUsers, Histories, Kind, Split


@dataclass(frozen=True)
class TimeSplit:
    """Time-based split: train before one moment, validate and test after two later ones.

    Training tasks hold interactions before the first moment only. The query of a validation task lies between the two
    moments, that of a test task after the second. Every support set precedes its query, latest first: smaller support
    sets are the most recent part of larger ones. The split does not depend on the seed.

    Attributes:
      fractions: shares of all interactions before the first moment, between the two, and after the second.
      moments: the two moments in seconds since 1970, instead of `fractions`.
      users: "all" also validates and tests users known from training; "new" only cold users, without an interaction
        before the moment that starts their query period.
      query: query size; a task needs this many interactions after the moment, and one more before them.
      maximum: number of latest interactions that a task keeps.
      target: "click" (1 where the rating is at least `threshold`, else 0), "rating", or "ranking" (find the clicks of
        the query among all items).
      threshold: lowest rating that is a click.

    Example:
      >>> plays = {"user_id": [1] * 6, "item_id": [1, 2, 3, 4, 5, 6], "timestamp": [10, 20, 30, 40, 50, 60]}
      >>> data = mr.data.from_tables(plays)
      >>> train, validation, test = mr.TimeSplit(moments=(30, 50), query=1).split(data)
      >>> data.timestamp[train.index].tolist(), data.timestamp[test.index].tolist()  # latest first
      ([20, 10], [60, 50, 40, 30, 20, 10])
    """

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    moments: tuple[int, int] | None = None
    users: Literal["all", "new"] = "all"
    query: int = 10
    maximum: int = 500
    target: Kind = "click"
    threshold: float = 4.0

    def __post_init__(self) -> None:
        if self.users not in ("all", "new") or self.target not in KINDS:
            raise ValueError(f'users is "all" or "new", target "click", "rating" or "ranking"; got {self}')
        if not 1 <= self.query < self.maximum:
            raise ValueError(f"need 1 <= query < maximum, got query={self.query}, maximum={self.maximum}")
        if len(self.fractions) != 3 or min(self.fractions) <= 0 or not abs(sum(self.fractions) - 1) <= 1e-6:
            raise ValueError(f"fractions must be three positive shares that sum to 1, got {self.fractions}")
        if self.moments is not None and not self.moments[0] < self.moments[1]:
            raise ValueError(f"moments must be two moments, the earlier first, got {self.moments}")

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split the interactions of a dataset in time; `seed` has no effect.

        Raises:
          DataError: there are no timestamps, or one of the three parts has no task.
        """
        if not len(data.timestamp) or data.timestamp.min() == data.timestamp.max():
            raise DataError(f"{data.name}: a split in time needs timestamps, and they are all the same")
        shares = np.cumsum(self.fractions[:2])
        first, second = self.moments or np.quantile(data.timestamp, shares, method="higher").tolist()
        everyone = np.arange(1, len(data.users))
        train = self._tasks(data, everyone, -(2**62), first)
        parts = {
            "training": train,
            "validation": self._tasks(data, everyone, first, second),
            "test": self._tasks(data, everyone, second, 2**62),
        }
        if empty := [name for name, part in parts.items() if not len(part)]:
            raise DataError(
                f"{data.name}: no {empty[0]} user has {self.query} interactions for the query and one more before them "
                f"(moments {first} and {second}); make the query smaller or move the moments"
            )
        return Split(*parts.values())

    def _tasks(self, data: Dataset, users: np.ndarray, since: int, until: int) -> Histories:
        """Return users' interactions before `until`, if enough of them are at or after `since` to be the query."""
        before_end = data.timestamp < until
        in_query_period = before_end & (data.timestamp >= since)
        count, total = (
            np.bincount(data.user[kept], minlength=len(data.users)) for kept in (in_query_period, before_end)
        )
        chosen = (count >= self.query) & (total > self.query)
        if self.users == "new" and since > -(2**62):
            chosen &= count == total
        tasks = Histories.of(data, users[chosen[users]], before_end).latest_first()
        return tasks.take(np.arange(len(tasks)), self.maximum)


@dataclass(frozen=True)
class Scenario:
    """One of MeLU's four scenarios: existing or new users, with existing or new items.

    Users and items are each split at random. Training tasks hold interactions of existing users with existing items.
    The support and query sets of validation and test tasks hold interactions of the scenario's users with the
    scenario's items. For "warm" (existing users and items), queries are excluded from training, unlike in MeLU's own
    protocol.

    Attributes:
      kind: "warm", "cold user", "cold item" or "cold both".
      new: share of the users, and of the items, that are new.
      query: query size.
      minimum, maximum: range of the number of interactions of a task.
      target: "click" (1 where the rating is at least `threshold`, else 0), "rating", or "ranking" (find the clicks of
        the query among all items).
      threshold: lowest rating that is a click.

    Example:
      >>> data = mr.data.synthetic(users=60, items=40)
      >>> train, validation, test = mr.Scenario("cold both", query=2, minimum=3).split(data)
      >>> np.intersect1d(train.users, test.users).size  # test users are new
      0
      >>> np.intersect1d(data.item[train.index], data.item[test.index]).size  # and so are the items of their tasks
      0

    References:
      Lee et al., MeLU, KDD 2019, section 4.1.
    """

    kind: Literal["warm", "cold user", "cold item", "cold both"] = "cold user"
    new: float = 0.2
    query: int = 10
    minimum: int = 13
    maximum: int = 100
    target: Kind = "rating"
    threshold: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in ("warm", "cold user", "cold item", "cold both") or self.target not in KINDS:
            raise ValueError(
                'kind is "warm", "cold user", "cold item" or "cold both", target "click", "rating" or "ranking"; '
                f"got {self}"
            )
        if not (0 < self.new < 1 and 1 <= self.query < self.minimum <= self.maximum):
            raise ValueError(f"need 0 < new < 1 and 1 <= query < minimum <= maximum, got {self}")

    def split(self, data: Dataset, seed: int = 0) -> Split:
        """Split users and items of a dataset.

        With the same seed all four scenarios train on the same interactions, except the queries that "warm" excludes.

        Raises:
          DataError: too few users have enough interactions in the scenario.
        """
        rng = np.random.default_rng(seed)
        new_user, new_item = (rng.random(len(names)) < self.new for names in (data.users, data.items))
        order = rng.permutation(np.arange(1, len(data.users)))
        trained = ~new_user[data.user] & ~new_item[data.item]
        scenario_user = new_user if self.kind in ("cold user", "cold both") else ~new_user
        scenario_item = new_item if self.kind in ("cold item", "cold both") else ~new_item
        evaluated = scenario_user[data.user] & scenario_item[data.item]
        train, tasks = (
            self._enough(Histories.of(data, order, kept).shuffled(np.random.default_rng(seed)))
            for kept in (trained, evaluated)
        )
        half = len(tasks) // 2
        if self.kind == "warm":  # exclude the queries from training
            kept_out = np.zeros(len(data.user), bool)
            kept_out[tasks.take(np.arange(len(tasks)), self.query).index] = True
            train = Histories.of(data, train.users, trained & ~kept_out)
        if not len(train) or not half:
            raise DataError(
                f"{data.name}: {len(tasks)} users have {self.minimum} to {self.maximum} interactions in the scenario "
                f"{self.kind!r} and {len(train)} in training, too few; widen the window or change `new`"
            )
        return Split(train, tasks.take(np.arange(half)), tasks.take(np.arange(half, len(tasks))))

    def _enough(self, histories: Histories) -> Histories:
        """Select users with `minimum` to `maximum` interactions."""
        length = histories.lengths
        return histories.take(np.flatnonzero((length >= self.minimum) & (length <= self.maximum)))


Protocol = ColdUsers | TimeSplit | Scenario | StrongGeneralisation | NextItem
PROTOCOLS: dict[str, Any] = {p.__name__: p for p in (*get_args(Protocol), StrongRatings, NextRating)}


def ratings_of(protocol: Protocol) -> Protocol:
    """Return the rating protocol with the same training users as a ranking `protocol`."""
    for ranking, rating in ((StrongGeneralisation, StrongRatings), (NextItem, NextRating)):
        if isinstance(protocol, ranking):
            return rating(**asdict(protocol))
    return replace(protocol, target="rating")  # type: ignore[arg-type]
