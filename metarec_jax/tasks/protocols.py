"""Protocols besides cold users: split in time, MeLU's four scenarios, and the table of all. Each has a `split`."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError
from metarec_jax.tasks.ranking_protocols import NextItem, NextRating, StrongGeneralisation, StrongRatings
from metarec_jax.tasks.splits import KINDS, ColdUsers, Histories, Kind, Split


@dataclass(frozen=True)
class TimeSplit:
    """Training on what came before a moment, validation and test on what came after two later ones.

    A training task holds interactions before the first moment only; of a validation task the query lies between the two
    moments, of a test task after the second. In every task the support set came before the query, the most recent
    first, so that smaller support sets are the more recent part of larger ones. Nothing depends on the seed.

    Attributes:
      fractions: shares of all interactions before the first moment, between the two, and after the second.
      moments: the two moments in seconds since 1970, in the place of `fractions`.
      users: "all" tests users whom training may know from before, "new" only those without an interaction before the
        moment that their query must follow: cold users.
      query: size of the query set; a tested user has so many interactions after the moment, and one more.
      maximum: a task holds at most so many interactions, the latest.
      target: "click" (1 where the rating is at least `threshold`, else 0), "rating", or "ranking" (the clicks of the
        query are to be found among all items).
      threshold: the lowest rating that counts as a click.
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
        """Split the interactions of a dataset in time; `seed` changes nothing.

        Raises:
          DataError: no timestamps, or one of the three parts has no task.
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
                f"{data.name}: no {empty[0]} user has {self.query} interactions of the query and one more before them "
                f"(moments {first} and {second}); make the query smaller or move the moments"
            )
        return Split(*parts.values())

    def _tasks(self, data: Dataset, users: np.ndarray, since: int, until: int) -> Histories:
        """Users' interactions before `until`, where enough of them are not before `since` to be the query."""
        before_end = data.timestamp < until
        late = before_end & (data.timestamp >= since)
        count, whole = (np.bincount(data.user[kept], minlength=len(data.users)) for kept in (late, before_end))
        chosen = (count >= self.query) & (whole > self.query)
        if self.users == "new" and since > -(2**62):
            chosen &= count == whole
        found = Histories.of(data, users[chosen[users]], before_end).latest_first()
        return found.take(np.arange(len(found)), self.maximum)


@dataclass(frozen=True)
class Scenario:
    """One of MeLU's four scenarios: existing or new users, recommended existing or new items.

    Users and items are each split at random. Training tasks hold interactions of existing users with existing items;
    validation and test tasks those of the scenario's users with the scenario's items, support and query alike. Of
    existing users with existing items (`"warm"`) the query is kept out of training, which MeLU's own protocol does not
    do.

    Attributes:
      kind: "warm", "cold user", "cold item" or "cold both".
      new: share of the users, and of the items, that are new.
      query: size of the query set.
      minimum, maximum: interactions that a task must have.
      target: "click" (1 where the rating is at least `threshold`, else 0), "rating", or "ranking" (the clicks of the
        query are to be found among all items).
      threshold: the lowest rating that counts as a click.

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
        """Split users and items of a dataset; with the same seed all four scenarios train on the same interactions,
        but for the queries that "warm" keeps out.

        Raises:
          DataError: too few users have enough interactions in the scenario.
        """
        rng = np.random.default_rng(seed)
        new_user, new_item = (rng.random(len(names)) < self.new for names in (data.users, data.items))
        order = rng.permutation(np.arange(1, len(data.users)))
        trained = ~new_user[data.user] & ~new_item[data.item]
        wanted_user = new_user if self.kind in ("cold user", "cold both") else ~new_user
        wanted_item = new_item if self.kind in ("cold item", "cold both") else ~new_item
        judged = wanted_user[data.user] & wanted_item[data.item]
        train, tasks = (
            self._enough(Histories.of(data, order, kept).shuffled(np.random.default_rng(seed)))
            for kept in (trained, judged)
        )
        half = len(tasks) // 2
        if self.kind == "warm":  # the first `query` interactions of each task are judged: training has the others
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
        """Those users with `minimum` to `maximum` interactions."""
        length = histories.lengths
        return histories.take(np.flatnonzero((length >= self.minimum) & (length <= self.maximum)))


Protocol = ColdUsers | TimeSplit | Scenario | StrongGeneralisation | NextItem
PROTOCOLS: dict[str, Any] = {p.__name__: p for p in (*get_args(Protocol), StrongRatings, NextRating)}


def ratings_of(protocol: Protocol) -> Protocol:
    """The protocol whose training users are those of a ranking `protocol`, and whose target is their ratings."""
    for ranking, rating in ((StrongGeneralisation, StrongRatings), (NextItem, NextRating)):
        if isinstance(protocol, ranking):
            return rating(**asdict(protocol))
    return replace(protocol, target="rating")  # type: ignore[arg-type]
