"""Observed: the training users' interactions as closed-form learners read them, and the tables they are kept in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from metarec_jax.factorise import log_popularity
from metarec_jax.models.profile import look_up
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks import Features, Params


class Observed(NamedTuple):
    """What the training users did.

    Attributes:
      user, item: `[interactions]` rows; users from 0, items as in the catalogue; of one user from the earliest to the
        latest.
      grade: `[interactions]` float32 from 0 (the lowest rating) to 1, as `Target.grade`.
      positive: `[interactions]` bool.
      features: of all items, each `[rows, ...]`, "item_id" among them; row 0 is the unknown item.
      profile: encoded attributes of the users, each `[users, ...]`.
      users: how many there are.
    """

    user: np.ndarray
    item: np.ndarray
    grade: np.ndarray
    positive: np.ndarray
    features: dict[str, np.ndarray]
    profile: dict[str, np.ndarray]
    users: int

    @property
    def items(self) -> int:
        """Rows of the catalogue."""
        return len(self.features["item_id"])

    def confidences(self) -> sp.csr_matrix:
        """`[users, items]` the grade of each interaction: one below the threshold says a little, too."""
        matrix = sp.csr_matrix((self.grade, (self.user, self.item)), shape=(self.users, self.items))
        matrix.eliminate_zeros()
        return matrix

    def positives(self) -> sp.csr_matrix:
        """`[users, items]` 1 for each positive interaction."""
        one = np.ones(int(self.positive.sum()), np.float32)
        kept = self.user[self.positive], self.item[self.positive]
        matrix = sp.csr_matrix((one, kept), shape=(self.users, self.items))
        matrix.data[:] = 1
        return matrix

    def of(self, users: np.ndarray) -> "Observed":
        """Those of some users, in the same catalogue."""
        row = np.full(self.users, -1)
        row[users] = np.arange(len(users))
        kept = row[self.user] >= 0
        profile = {name: table[users] for name, table in self.profile.items()}
        item, grade, positive = (x[kept] for x in (self.item, self.grade, self.positive))
        return Observed(row[self.user[kept]], item, grade, positive, self.features, profile, len(users))


def popularity(params: Params, features: Features) -> jax.Array:
    """`[...]` log popularity of the items of some features; of an item that is new that of one nobody has chosen."""
    table = params["tables"]["log_popularity"]
    return look_up(lambda x: table[x][..., None], features["item_id"], "categorical")[..., 0]


def among(scores: jax.Array, features: Features) -> jax.Array:
    """`[users, n]` of a user's scores of all items `[users, items]` those of the items of some features."""

    def column(ids: jax.Array) -> jax.Array:
        return jnp.take_along_axis(scores, ids, 1)[..., None]

    return look_up(column, features["item_id"], "categorical")[..., 0]


def tables(strategy: Strategy, observed: Observed) -> dict[str, Any]:
    """What a strategy that ranks finds in `params["tables"]`: the catalogue, its popularity and what `fit` learns."""
    found: dict[str, Any] = {"items": observed.features, "log_popularity": log_popularity(observed.positives())}
    return found | ({"fitted": strategy.fit(observed)} if strategy.fit else {})
