"""Recommendations: the returned items, and the options that select and order them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from metarec_jax.errors import DataError, OptionError
from metarec_jax.inference.histories import is_number
from metarec_jax.inference.ranker import Explore

if TYPE_CHECKING:
    import polars as pl

Where = Mapping[str, Any]


class Recommendation(NamedTuple):
    """A recommended item.

    Attributes:
      item: raw id.
      score: a click probability or a rating; of `ask`, the evidence value.
      title: the item's title, or None.
    """

    item: Any
    score: float
    title: str | None


class UncertainRecommendation(NamedTuple):
    """A `Recommendation` with the standard deviation of its rating (including noise) or click logit."""

    item: Any
    score: float
    title: str | None
    deviation: float


@dataclass(frozen=True)
class Choice:
    """Options that select and order recommendations; see `metarec_jax.Recommender.recommend`."""

    exclude_seen: bool = True
    where: Where | Sequence[Where] | None = None
    only: Sequence[Any] | None = None
    block: Sequence[Any] = ()
    diversity: float = 0.0
    explore: Explore | None = None
    strength: float = 1.0
    seed: int | Sequence[int | None] | None = None
    deviation: bool = False
    approximate: bool = False
    by: Literal["score", "rating"] | float = "score"

    def __post_init__(self) -> None:
        share = isinstance(self.by, int | float) and not isinstance(self.by, bool)
        if self.by not in ("score", "rating") and not (share and 0 <= float(self.by) <= 1):
            raise OptionError(f'by is "score", "rating" or a share from 0 to 1, got {self.by!r}')
        if share and self.explore is not None:
            raise OptionError(f'explore goes with by="score" or by="rating", not with a share; got by={self.by!r}')
        if not is_number(self.strength):
            raise OptionError(f"strength must be a finite number, got {self.strength!r}")
        seeds = self.seed if isinstance(self.seed, list | tuple) else [self.seed]
        if not all(
            seed is None or (isinstance(seed, int | np.integer) and not isinstance(seed, bool)) for seed in seeds
        ):
            raise OptionError(
                f"seed must be an integer, a list of integers with one per user, or None; got {self.seed!r}"
            )
        if not is_number(self.diversity) or not 0 <= self.diversity <= 1:
            raise OptionError(f"diversity is a share from 0 to 1, got {self.diversity}")
        if self.explore not in (None, "ucb", "thompson"):
            raise OptionError(f"explore must be 'ucb' or 'thompson', got {self.explore!r}")

    def seeds(self, users: int) -> np.ndarray:
        """Return the users' seeds of the draws `[users]`; fresh seeds where none is given."""
        seeds = self.seed if isinstance(self.seed, list | tuple) else [self.seed] * users
        if len(seeds) != users:
            raise OptionError(f"seed: got {len(seeds)} seeds for {users} users; give one per user, or one for all")
        fresh = np.random.SeedSequence().generate_state(users)
        return np.array(
            [new if seed is None else seed % 2**32 for seed, new in zip(seeds, fresh, strict=True)], np.uint32
        )

    @property
    def reranks(self) -> bool:
        """Whether more candidates are ranked than are recommended."""
        return bool(self.diversity) or self.by not in ("score", "rating")


def checked_count(k: Any) -> None:
    """Raise `DataError` unless `k` is a positive integer."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise DataError(f"k must be a positive integer, got {k!r}")


def as_table(users: Sequence[Any], lists: Sequence[Sequence[Recommendation]], text_items: bool) -> "pl.DataFrame":
    """Build a table of recommendations: user_id, item_id, rank (from 1) and score.

    Args:
      users: raw ids of one type, one per list.
      lists: recommendations of each user, best first.
      text_items: whether item ids are strings.
    """
    import polars as pl

    text = [isinstance(users[0], str) if users else False, text_items]
    of_user, of_item = (pl.String if t else pl.Int64 for t in text)
    rows = [
        (user, rank, r)
        for user, recommendations in zip(users, lists, strict=True)
        for rank, r in enumerate(recommendations, 1)
    ]
    return pl.DataFrame(
        {
            "user_id": pl.Series([user for user, _, _ in rows], dtype=of_user),
            "item_id": pl.Series([r.item for _, _, r in rows], dtype=of_item),
            "rank": pl.Series([rank for _, rank, _ in rows], dtype=pl.Int64),
            "score": pl.Series([r.score for _, _, r in rows], dtype=pl.Float64),
        }
    )
