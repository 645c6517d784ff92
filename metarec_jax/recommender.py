"""Recommender: the user-facing facade that recommends, predicts, explains, evaluates and remembers users."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metarec_jax.batch import Batch, Context, warn_of_unknown
from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError
from metarec_jax.evaluation import holdout
from metarec_jax.inference import export
from metarec_jax.inference.evidence import evidence
from metarec_jax.inference.explain import Explanation
from metarec_jax.inference.histories import History
from metarec_jax.inference.predictor import Attributes, Predictor
from metarec_jax.inference.ranker import Explore
from metarec_jax.inference.recommendations import Choice, Recommendation, Where, checked_count
from metarec_jax.inference.stock import Stock
from metarec_jax.metrics.ranking import SIZES
from metarec_jax.metrics.table import Table
from metarec_jax.state import models
from metarec_jax.state.events import Event, Store, UserId
from metarec_jax.state.feedback import checked, checked_id
from metarec_jax.state.memory import Memory
from metarec_jax.state.sqlite_store import SqliteStore
from metarec_jax.state.stores import open_store
from metarec_jax.strategies import Strategy
from metarec_jax.tasks.candidates import Among
from metarec_jax.tasks.protocols import Protocol
from metarec_jax.tasks.splits import Split
from metarec_jax.tasks.target import Target
from metarec_jax.training.train import refit
from metarec_jax.training.trained import Trained
from metarec_jax.types import Params

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, eq=False)
class Recommender:
    """A trained model, its catalogue and the users it remembers; built by `metarec_jax.train` or `metarec_jax.load`.

    Attributes:
      trained: the model: strategy, parameters, catalogue, target and protocol (`metarec_jax.training.trained.Trained`).
      predictor: the model applied to the items that can be recommended.
      users: store of the events passed to `update` (default: in memory).
      half_life: half-life of an event's weight in seconds; None: no decay.
      version: version of the saved model; None unless loaded.
    """

    trained: Trained
    predictor: Predictor = None  # type: ignore[assignment]
    users: Store = field(default_factory=SqliteStore)
    half_life: float | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if self.predictor is None:
            object.__setattr__(self, "predictor", Predictor(self.trained))

    def __repr__(self) -> str:
        name, epochs = self.trained.name or "a strategy of the caller", len(self.trained.history)
        return (
            f"Recommender({name}, {self.trained.target.kind}, {len(self.predictor.stock) - 1:,} items, {epochs} epochs)"
        )

    @property
    def batch(self) -> Batch:
        """The calls of this recommender for many users."""
        return Batch(self.predictor, Memory(self.users, self.half_life))

    @property
    def strategy(self) -> Strategy:
        return self.trained.strategy

    @property
    def params(self) -> Params:
        return self.trained.params

    @property
    def catalogue(self) -> Dataset:
        return self.trained.catalogue

    @property
    def target(self) -> Target:
        return self.trained.target

    @property
    def protocol(self) -> Protocol:
        return self.trained.protocol

    @property
    def limits(self) -> tuple[float, float]:
        return self.trained.limits

    @property
    def history(self) -> list[dict[str, float]]:
        return self.trained.history

    @property
    def stock(self) -> Stock:
        return self.predictor.stock

    @property
    def rater(self) -> "Recommender | None":
        """The rating model that `predict` of a ranking uses, else None; `rater.evaluate()` evaluates it."""
        predictor = self.predictor.rater
        return None if predictor is None else Recommender(predictor.trained, predictor)

    def recommend(
        self,
        history: History,
        k: int = 10,
        *,
        user: Attributes = None,
        context: Context = None,
        exclude_seen: bool = True,
        where: Where | None = None,
        only: Sequence[Any] | None = None,
        block: Sequence[Any] = (),
        diversity: float = 0.0,
        explore: Explore | None = None,
        strength: float = 1.0,
        seed: int | None = None,
        deviation: bool = False,
        approximate: bool = False,
        by: Literal["score", "rating"] | float = "score",
    ) -> list[Any]:
        """Recommend the `k` best items of the stock to one new user; `batch` has the same call for many.

        Args:
          history: `{item: rating}`, `[(item, rating), ...]` or `[item, ...]` with raw item ids, or a table; see
            `metarec_jax.inference.histories.encode_history`. `(item, rating, {"device": "phone"})` has a context. An
            empty history is a cold start. The last rating of an item counts. Unknown items count as ratings of an
            unknown item, with an `UnknownItemWarning`. Only the last 512 interactions are used.
          k: number of items; fewer are returned if fewer are left.
          user: attributes of the user, `{"age": 30}`. Omitted attributes are unknown.
          context: context of the call, `{"device": "phone"}`; omitted fields are unknown. Some strategies ignore it.
          exclude_seen: exclude the items of the history.
          where: filter by item fields, `{"genres": ["Comedy", "Romance"], "price": (None, 20.0)}`: any of the
            categories, within the bounds.
          only, block: ids of the available items (default: all), and of unavailable items.
          diversity: weight of the similarity penalty (MMR), from 0 (best scores) to 1 (items unlike each other). The
            candidates are the 10 k best items, at least 100 and at most 1,000.
          explore: "ucb" ranks by score + strength * deviation. "thompson" ranks by the scores of a user vector drawn
            from the posterior; the strategy must have one, as `alpaca`, `ials` and `stack` do.
          strength: factor of the deviation, or of the draw's difference from the posterior mean.
          seed: seed of the draw (default: a fresh one).
          deviation: return `UncertainRecommendation`s.
          approximate: use `jax.lax.approx_max_k`: faster on a TPU, may miss one item in twenty.
          by: "score"; "rating", the expected rating of `predict`, which favours items that few users know and like
            much; or a share w from 0 to 1. A share ranks the candidates (those of `diversity`) by the new score
            (1 - w) z(score) + w z(rating), where z standardises over a user's candidates. `deviation` and `explore`
            use the rating with "rating", else the score.

        Returns:
          A list of `Recommendation`, best first.

        Raises:
          DataError: an item id of another type than in training; a rating that is not finite or off the scale; an
            unknown attribute, context, field or category.
          ValueError: `deviation` or `explore` with a strategy that does not support it; `diversity` or `by` outside 0
            to 1; `by` without a rating model (see `predict`); a share together with `explore`.

        References:
          Carbonell and Goldstein, The Use of MMR, SIGIR 1998, section 2. Item similarity is the cosine of the vectors
          that the network computes of each item alone (`Ranker.vectors`).
        """
        person = self.predictor.person(history, user)
        warn_of_unknown([person])
        choice = Choice(
            exclude_seen, where, only, block, diversity, explore, strength, seed, deviation, approximate, by
        )
        return self.predictor.top([person], k, context, choice)[0]

    def recommend_to(self, user: UserId, k: int = 10, *, context: Context = None, **choice: Any) -> list[Any]:
        """Recommend the `k` best items to a known user.

        Known users are those of the dataset and of `update`. Their history is the interactions in the dataset, then the
        events of `update`. A loaded model holds no interactions and knows only the users of `update`.

        Args:
          user: raw id; an unseen user is a cold start.
          k, context, **choice: see `recommend`.

        Raises:
          DataError, ValueError: as `recommend`; an id that is not an integer or string.
          StoreError: the store cannot be read.
        """
        return self.batch.recommend_to([_one_id(user, "recommend_to")], k, context=context, **choice)[0]

    def recommend_all(
        self, k: int = 10, users: Sequence[UserId] | None = None, *, path: str | Path | None = None, **options: Any
    ) -> "pl.DataFrame":
        """Recommend the `k` best items to many users; return a table of user_id, item_id, rank (from 1) and score.

        Args:
          k: see `recommend`.
          users: raw ids of one type (default: all users of the dataset; required for a loaded model, which holds none).
          path: Parquet file to write the table to; it is replaced once the new one is complete.
          **options: `progress`, whether to show a bar; `context` and the options of `recommend`.
        """
        if users is None and not len(self.catalogue.rating):
            raise DataError("a loaded model holds no users: recommend_all(k, users=[...])")
        ids = self.catalogue.users.ids.tolist() if users is None else users
        return self.batch.table(ids, k, path=path, **options)

    def predict(
        self, history: History, items: Sequence[Any], *, user: Attributes = None, context: Context = None
    ) -> list[float]:
        """Predict ratings, or click probabilities, of given items for one new user; `batch` has the same call for many.

        `recommend` ranks what the user would choose; `predict` tells how much the user would like it. Models of clicks
        or ratings predict themselves; a ranking asks its `rater`. Bare item ids in a history count as rated highest.

        Args:
          history, user, context: see `recommend`.
          items: raw ids, in any order; repeats are allowed.

        Returns:
          Numbers in the order of `items`. Ratings are clipped to the scale.

        Raises:
          DataError: as `recommend`; an item that is not in the stock.
          ValueError: a ranking without a rating model (data of a single rating value, or trained with `ratings=None`).
        """
        person = self.predictor.person(history, user)
        warn_of_unknown([person])
        return self.predictor.expected([person], items, context)[0]

    def predict_for(self, user: UserId, items: Sequence[Any], *, context: Context = None) -> list[float]:
        """Call `predict` for a known user; see `recommend_to`."""
        return self.batch.predict_for([_one_id(user, "predict_for")], items, context=context)[0]

    def similar_items(self, item: Any, k: int = 10) -> list[Recommendation]:
        """Return the `k` items most similar to a given item, by the cosine of their vectors (`Ranker.vectors`)."""
        return self.predictor.similar(item, k)

    def explain(
        self, who: History | UserId, item: Any, *, user: Attributes = None, context: Context = None
    ) -> Explanation:
        """Explain an item's score by the effect of each interaction of the user and of each field.

        Args:
          who: a history, as in `recommend`, or the id of a user, as in `recommend_to`.
          item: raw id.
          user: attributes of the user, only with a history.
          context: see `recommend`.

        Raises:
          DataError: an unknown item; a bad history; `user` together with a user id.
        """
        if not isinstance(who, int | str | np.integer):
            return self.predictor.explain(self.predictor.person(who, user), item, context)
        if user is not None:
            raise DataError("user: attributes go with a history only; set those of a known user with describe_user")
        (person,) = self.batch.remembered([who])  # type: ignore[list-item]
        return self.predictor.explain(person, item, context)

    def ask(self, k: int = 10, data: Dataset | None = None) -> list[Recommendation]:
        """Return up to `k` items to ask a new user about, most informative first: MeLU's evidence candidates.

        They have many ratings, and each alone moves the adapted parameters far (`metarec_jax.inference.evidence`).
        `data` is as in `evaluate`. Raises `ValueError` if the strategy adapts nothing.
        """
        checked_count(k)
        value = evidence(self.strategy, self.params, self.split(data, "ask(k, data)").train, self.target)
        rows = np.argsort(-value, kind="stable")[: min(k, np.count_nonzero(value))]
        return self.predictor.readable(rows, value[rows])

    def update(self, events: Iterable[Event | Mapping[str, Any]]) -> int:
        """Store events of users; the next recommendation reflects them.

        Users and items may be new. A new item is unknown until `add_items`. A user's latest event with an item counts.

        Args:
          events: `Event`s, or mappings with the same keys, of any users, with or without a `context`. A click counts as
            the lowest rating that is a click, a purchase as the highest rating, a dismissal as the lowest.

        Returns:
          Number of new events, without repeated ids of a user. They are stored as durably as `users` stores them.

        Raises:
          DataError: an invalid event, or an unknown context field or category; none of the call's events is stored.
          StoreError: the store cannot be written.
        """
        return self.users.append(self.checked(events))[0]

    def checked(self, events: Iterable[Event | Mapping[str, Any]]) -> list[Event]:
        """Return the events as `update` would store them; raise `DataError` if one is invalid."""
        kind = str if self.stock.trained.ids.dtype.kind == "U" else int
        return checked(events, kind, self.limits, self.catalogue.context_fields)

    def describe_user(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Replace a user's stored attributes, `{"age": 30}`; raise `DataError` for an invalid one."""
        self.predictor.attributes(attributes)
        self.users.describe(checked_id(user, None, "user"), attributes)

    def forget(self, user: UserId) -> int:
        """Delete all data of a user from `users`, not from the dataset; return the number of deleted events."""
        return self.users.forget(checked_id(user, None, "user"))

    def with_users(self, users: str | Path | Store, half_life: float | None = None) -> "Recommender":
        """Return a recommender with another store of users.

        Args:
          users: path of a SQLite file (created if missing), `redis://host:port/database`, or a `Store`.
          half_life: half-life of an event's weight in seconds, above 0; None: no decay.
        """
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be seconds above 0, or None, got {half_life}")
        return replace(self, users=open_store(users), half_life=half_life)

    def add_items(self, items: Mapping[str, Sequence[Any]]) -> "Recommender":
        """Return a recommender with additional items, known by their attributes; existing items are not recomputed.

        Args:
          items: columns, `{"item_id": [...], "title": [...], "genres": [[...], ...]}`; see `Stock.add`.
        """
        return replace(self, predictor=self.predictor.extended(items))

    def refit(self, progress: bool = True) -> "Recommender":
        """Train again on the users of training, validation and test together, up to the best epoch of the training.

        Evaluate before: the result refuses to. Items of `add_items` are left out; add them again.

        Raises:
          OptionError: a recommender that was loaded, reweighted or refitted.
        """
        trained = refit(self.trained, progress)
        return replace(self, trained=trained, predictor=Predictor(trained))

    def evaluate(
        self,
        data: Dataset | None = None,
        *,
        support: int | None = None,
        candidates: Among = "query",
        baselines: bool = True,
    ) -> Table:
        """Evaluate on the protocol's test tasks, next to simple baselines; return `{learner: {metric: value}}`.

        The dict prints as a table and converts to polars and pandas.

        Args:
          data: the training dataset; required for a loaded model only.
          support: largest support size (default: all interactions outside the query).
          candidates: for clicks, the items to rank the query among: "query", its own items; a number, also as many
            sampled items that the user has no interaction with; "all", all such items. They count as not clicked.
          baselines: include two means, ALS fold-in and item-kNN; where clicks are made from ratings, also the same
            three on ratings.

        Raises:
          DataError: a loaded model without `data`, or data that do not match the training.
          ValueError: an unknown `candidates`, or one other than "query" for ratings.
        """
        return holdout.evaluate(self.trained, data, support=support, candidates=candidates, baselines=baselines)

    def rankings(
        self, data: Dataset | None = None, *, sizes: Sequence[int | None] = SIZES, baselines: bool = True
    ) -> dict[str, dict[str, np.ndarray]]:
        """Compute each ranking metric `[users]` by learner, for every test user, among all items but the support.

        Args:
          data: see `evaluate`.
          sizes: support sizes, None for all; see `metarec_jax.metrics.ranking.by_support`.
          baselines: include popularity, item-kNN, EASE and iALS, tuned on validation users; see `ranking_baselines`.
        """
        return holdout.evaluate_rankings(self.trained, data, sizes=sizes, baselines=baselines)

    def split(self, data: Dataset | None = None, call: str = "split(data)") -> Split:
        """Return the training, validation and test split of the training; see `Trained.split`."""
        return self.trained.split(data, call)

    def save(self, path: str | Path) -> None:
        """Write the model as a folder of JSON and safetensors files.

        A model at `path` is replaced once the new one is complete; `ModelFileError` if anything else exists there.
        """
        models.save(self.predictor, path)

    def export(self, folder: str | Path, **options: Any) -> None:
        """Write adapt-and-recommend as a function that JAX alone can run; see `inference.export.export`."""
        export.export(self.predictor, folder, **options)

    def export_vectors(self, path: str | Path) -> None:
        """Write the item vectors as Parquet or npz; see `inference.export.export_vectors`."""
        export.export_vectors(self.predictor, path)


def _one_id(user: Any, call: str) -> UserId:
    """Return a user id; raise `DataError` for a list of them."""
    if isinstance(user, Iterable) and not isinstance(user, str | bytes):
        raise DataError(f"user: expected one id, got {user!r}; several users: recommender.batch.{call}(users)")
    return user
