"""Recommender: the facade. `metarec_jax.train` makes one; it recommends, remembers users, evaluates and explains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError
from metarec_jax.evaluation import holdout
from metarec_jax.inference import export
from metarec_jax.inference.evidence import evidence
from metarec_jax.inference.explain import Explanation
from metarec_jax.inference.histories import History
from metarec_jax.inference.predictor import Attributes, EncodedUser, Predictor
from metarec_jax.inference.ranker import Explore
from metarec_jax.inference.recommendations import Choice, Recommendation, Where, as_table, checked_count
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
from metarec_jax.training.trained import Trained
from metarec_jax.types import Params

if TYPE_CHECKING:
    import polars as pl

P = ParamSpec("P")
Context = Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class Recommender:
    """A trained model, what serves it, and the users that it remembers.

    Attributes:
      trained: the model: strategy, parameters, catalogue, target, protocol (`metarec_jax.training.trained.Trained`).
      predictor: the model over the items that can be recommended.
      users: what users did since the training, see `update` (default: kept in memory).
      half_life: seconds in which an event of `update` loses half its weight; None: all weigh the same.
      version: of the saved model that this was loaded from.
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
        """Of a ranking, the recommender of expected ratings that `predict` asks; `rater.evaluate()` judges it."""
        predictor = self.predictor.rater
        return None if predictor is None else Recommender(predictor.trained, predictor)

    def recommend(
        self,
        history: History | Sequence[History],
        k: int = 10,
        *,
        user: Attributes | Sequence[Attributes] = None,
        context: Context = None,
        exclude_seen: bool = True,
        where: Where | Sequence[Where] | None = None,
        only: Sequence[Any] | None = None,
        block: Sequence[Any] = (),
        diversity: float = 0.0,
        explore: Explore | None = None,
        strength: float = 1.0,
        seed: int | Sequence[int | None] | None = None,
        deviation: bool = False,
        approximate: bool = False,
        by: Literal["score", "rating"] | float = "score",
    ) -> Any:
        """The `k` best items of the whole stock for a new user, or for each of a batch of new users.

        Args:
          history: what a user has rated, `{item: rating}` or `[(item, rating), ...]` with raw item ids; or a list of
            such. An empty history gets the ranking of a user about whom nothing is known. An item rated twice counts
            with its later rating; unknown items count as ratings of an unknown item. Of more than 512 the last 512
            count.
          k: how many; fewer come back when fewer items are left.
          user: attributes of the user (or a list of them), `{"age": 30}`; what is left out is unknown.
          context: what is around the call, for all its users, `{"device": "phone"}`; what is left out is unknown, as
            are the contexts of the history.
          exclude_seen: leave out what is in the history.
          where: what an item must be, by its fields: `{"genres": ["Comedy", "Romance"], "price": (None, 20.0)}`, any of
            the categories, between the bounds; or a list of such, one a user.
          only, block: ids of the items that are available (default: all), and of those that are not.
          diversity: from 0 (the best scores) to 1 (items unlike each other): how much of an item's worth its likeness
            to those above it takes away (MMR), among the 10 k best, at least 100 and at most 1,000.
          explore: "ucb" ranks by score + strength * deviation, "thompson" by the scores of a user vector that is drawn
            from the posterior, for strategies that have one, as `alpaca`, `ials` and `stack`.
          strength, seed: factor of the deviation, and of the draw's difference from the mean; seed of the draw, one
            for all users or one each (default: new ones). The draw of a user does not depend on the others.
          deviation: give `UncertainRecommendation`s.
          approximate: find the best by `jax.lax.approx_max_k`: faster on a TPU, and may miss one in twenty.
          by: "score"; "rating", the rating that `predict` expects, which favours what few know and like much; or a
            share w from 0 to 1 of it: of the candidates, as for `diversity`, those with the largest (1 - w) z(score) +
            w z(rating), z in standard deviations from the mean of these candidates. That is then the `score` of a
            recommendation. `deviation` and `explore` are those of the rating with "rating", else of the score.

        Returns:
          A list of `Recommendation`, best first; for a batch a list of such lists.

        Raises:
          DataError: item ids of another type than in training; a rating that is no finite number or off the scale; an
            unknown attribute, context, field or category.
          ValueError: the deviation is asked of a strategy that does not know it; `diversity` or `by` outside 0 to 1;
            `by` where there is no rating to go by (see `predict`); a share together with `explore`.

        References:
          Carbonell and Goldstein, The Use of MMR, SIGIR 1998, section 2; the likeness of items is the cosine of what
          the network computes of each alone (`Ranker.vectors`).
        """
        single, people = self.predictor.people(history, user)
        choice = Choice(
            exclude_seen, where, only, block, diversity, explore, strength, seed, deviation, approximate, by
        )
        lists = self.predictor.top(people, k, context, choice)
        return lists[0] if single else lists

    def recommend_to(
        self, users: UserId | Sequence[UserId], k: int = 10, *, context: Context = None, **choice: Any
    ) -> Any:
        """The `k` best items for a user of the dataset or of `update`, or for each of a list of users.

        Of a user of the dataset the interactions there count, and then the events of `update`. A loaded model holds no
        interactions, and knows the users of `update` alone.

        Args:
          users: raw id or a list of ids; one never seen gets the ranking of a user about whom nothing is known.
          k, context, **choice: see `recommend`.

        Raises:
          DataError, ValueError: as `recommend`; an id that is no integer or string.
          StoreError: the store cannot be read.
        """
        single, people = self._remembered(users)
        lists = self.predictor.top(people, k, context, Choice(**choice))
        return lists[0] if single else lists

    def recommend_all(
        self, k: int = 10, users: Sequence[UserId] | None = None, *, context: Context = None, **choice: Any
    ) -> "pl.DataFrame":
        """The `k` best items of many users as a table: user_id, item_id, rank (from 1) and score.

        Args:
          k, context, **choice: see `recommend_to`.
          users: raw ids of one type (default: all users of the dataset, which a loaded model does not hold).
        """
        if users is None and not len(self.catalogue.rating):
            raise DataError("a loaded model holds no users: recommend_all(k, users=[...])")
        if isinstance(users, str) or not isinstance(users, Iterable | None):
            raise DataError(f"users: expected a list of ids, got {users!r}")
        ids = self.catalogue.users.ids.tolist() if users is None else [checked_id(u, None, "user") for u in users]
        lists = self.recommend_to(ids, k, context=context, **choice) if ids else []
        return as_table(ids, lists, self.stock.trained.ids.dtype.kind == "U")

    def predict(
        self,
        history: History | Sequence[History],
        items: Sequence[Any],
        *,
        user: Attributes | Sequence[Attributes] = None,
        context: Context = None,
    ) -> Any:
        """What a new user, or each of a batch, would think of given items: expected ratings or click probabilities.

        `recommend` answers another question: which items the user would choose. A recommender trained for clicks or
        ratings answers by itself, one that ranks by its `rater`. Items given alone as a history count as rated highest.

        Args:
          history, user, context: see `recommend`.
          items: raw ids, in any order; one may come twice.

        Returns:
          A list of numbers in the order of `items`; for a batch a list of such lists. Ratings are within the scale of
          the data.

        Raises:
          DataError: as `recommend`; an item that the stock does not hold.
          ValueError: a ranking whose data had one rating only, or that was trained with `ratings=None`: nothing tells
            how much an item is liked.
        """
        single, people = self.predictor.people(history, user)
        ratings = self.predictor.expected(people, items, context)
        return ratings[0] if single else ratings

    def predict_for(self, users: UserId | Sequence[UserId], items: Sequence[Any], *, context: Context = None) -> Any:
        """`predict` for a user of the dataset or of `update`, or for each of a list; see `recommend_to`."""
        single, people = self._remembered(users)
        ratings = self.predictor.expected(people, items, context)
        return ratings[0] if single else ratings

    def similar_items(self, item: Any, k: int = 10) -> list[Recommendation]:
        """The `k` items most like a given one, whatever a user's taste.

        The score is the cosine of what the network computes of each item alone (`Ranker.vectors`): of the default, who
        chose them and what their fields say.
        """
        return self.predictor.similar(item, k)

    def explain(
        self, who: History | UserId, item: Any, *, user: Attributes = None, context: Context = None
    ) -> Explanation:
        """Why an item has its score: what each of the user's interactions did to it, and each field.

        Args:
          who: a history, as of `recommend`, or the id of a user, as of `recommend_to`.
          item: raw id.
          user: attributes that go with a history.
          context: see `recommend`.

        Raises:
          DataError: an unknown item, a bad history; `user` with the id of a user.
        """
        if not isinstance(who, int | str | np.integer):
            return self.predictor.explain(self.predictor.person(who, user), item, context)
        if user is not None:
            raise DataError("user: the attributes of a user of update are given to describe_user")
        _, (person,) = self._remembered(who)  # type: ignore[arg-type]
        return self.predictor.explain(person, item, context)

    def ask(self, k: int = 10, data: Dataset | None = None) -> list[Recommendation]:
        """The `k` items to ask a new user about first, most telling first: MeLU's evidence candidates.

        Those that many training users have rated and whose ratings, each taken alone, move the adapted parameters the
        most (`metarec_jax.inference.evidence`, which the scores are). Fewer come back when fewer items have ratings; a
        `ValueError` says that the strategy adapts nothing. `data` is as of `evaluate`.
        """
        checked_count(k)
        value = evidence(self.strategy, self.params, self.split(data, "ask(k, data)").train, self.target)
        rows = np.argsort(-value, kind="stable")[: min(k, np.count_nonzero(value))]
        return self.predictor.readable(rows, value[rows])

    def update(self, events: Iterable[Event | Mapping[str, Any]]) -> int:
        """Keep what users did; the next recommendation reflects it.

        Users and items may be new: a new item counts as an unknown one until `add_items`. Of several events of a user
        with the same item the latest counts.

        Args:
          events: `Event`s or mappings with the same names, in any order, of any number of users. A click counts as the
            lowest rating that is one, a purchase as the highest rating, a dismissal as the lowest.

        Returns:
          How many were new: an event of a user with an id that was there is not. When it returns they are kept for good
          (as far as `users` keeps them).

        Raises:
          DataError: an event that cannot be one; none of the call's events is kept then.
          StoreError: the store cannot be written.
        """
        return self.users.append(self.checked(events))[0]

    def checked(self, events: Iterable[Event | Mapping[str, Any]]) -> list[Event]:
        """What `update` would keep, or the `DataError` that it would raise."""
        return checked(events, str if self.stock.trained.ids.dtype.kind == "U" else int, self.limits)

    def describe_user(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Keep a user's attributes, `{"age": 30}`, in place of those before; a `DataError` names a bad one."""
        self.predictor.attributes(attributes)
        self.users.describe(checked_id(user, None, "user"), attributes)

    def forget(self, user: UserId) -> int:
        """Remove every trace of a user from `users`, not from the dataset; returns how many events there were."""
        return self.users.forget(checked_id(user, None, "user"))

    def with_users(self, users: str | Path | Store, half_life: float | None = None) -> "Recommender":
        """The recommender with another store of what users did.

        Args:
          users: the path of a file (SQLite; made when there is none), `redis://host:port/database`, or a `Store`.
          half_life: seconds in which an event loses half its weight; None: all weigh the same.
        """
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be seconds above 0, or None, got {half_life}")
        return replace(self, users=open_store(users), half_life=half_life)

    def add_items(self, items: Mapping[str, Sequence[Any]]) -> "Recommender":
        """The recommender with more items, known by their attributes; nothing of the others is computed again.

        Args:
          items: columns, `{"item_id": [...], "title": [...], "genres": [[...], ...]}`; see `Stock.add`.
        """
        return replace(self, predictor=self.predictor.extended(items))

    def evaluate(
        self,
        data: Dataset | None = None,
        *,
        support: int | None = None,
        candidates: Among = "query",
        baselines: bool = True,
    ) -> Table:
        """Metrics on the test tasks of the protocol, beside the plain baselines on the same tasks, as a dict
        `{learner: {metric: value}}` that prints itself and converts to polars and pandas.

        Args:
          data: the dataset of the training; may be left out unless the model was loaded.
          support: largest support size (default: all that a user has besides the query).
          candidates: of clicks, among what the query is ranked: "query", its own items; a number, so many sampled
            items besides that the user has no interaction with; "all", all such items. They count as not clicked.
          baselines: compute two means, ALS fold-in and item-kNN too; where clicks are made from ratings, also the same
            three of ratings.

        Raises:
          DataError: a loaded model without `data`, or data that do not fit.
          ValueError: `candidates` other than "query" for ratings, or an unknown one.
        """
        return holdout.evaluate(self.trained, data, support=support, candidates=candidates, baselines=baselines)

    def rankings(
        self, data: Dataset | None = None, *, sizes: Sequence[int | None] = SIZES, baselines: bool = True
    ) -> dict[str, dict[str, np.ndarray]]:
        """`[users]` of each metric of a ranking, by learner: every test user, and all items but the support.

        Args:
          data: see `evaluate`.
          sizes: support sizes, None for all; see `metarec_jax.metrics.ranking.by_support`.
          baselines: popularity, item-kNN, EASE and iALS too, tuned on the validation users; see `ranking_baselines`.
        """
        return holdout.evaluate_rankings(self.trained, data, sizes=sizes, baselines=baselines)

    def split(self, data: Dataset | None = None, call: str = "split(data)") -> Split:
        """The split of the training; see `Trained.split`."""
        return self.trained.split(data, call)

    def save(self, path: str | Path) -> None:
        """Write the model as a folder of JSON and safetensors files; an earlier model there is replaced at once, and a
        `ModelFileError` raised where something else stands."""
        models.save(self.predictor, path)

    def export(self, folder: str | Path, **options: Any) -> None:
        """Write adapting and recommending as a function that JAX alone can run; see `inference.export.export`."""
        export.export(self.predictor, folder, **options)

    def export_vectors(self, path: str | Path) -> None:
        """Write the items' vectors as Parquet or npz; see `inference.export.export_vectors`."""
        export.export_vectors(self.predictor, path)

    def _remembered(self, users: UserId | Sequence[UserId]) -> tuple[bool, list[EncodedUser]]:
        """Whether it is one user, and what is known of the users."""
        single = isinstance(users, str) or not isinstance(users, Iterable)
        ids = [checked_id(u, None, "user") for u in ([users] if single else users)]  # type: ignore[union-attr, list-item]
        return single, Memory(self.users, self.half_life).users(self.predictor, ids)
