"""Recommender: the thin wrapper that people touch. `train` makes one; it recommends, evaluates, saves and loads."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax._progress import epochs_bar
from metarec_jax._progress import tensorboard as event_files
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.schema import fields_of
from metarec_jax.data.tables import from_tables
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError, ModelFileError
from metarec_jax.evaluation.baselines import score_baselines
from metarec_jax.evaluation.protocol import fingerprint
from metarec_jax.evaluation.ranking_baselines import ranking_baselines
from metarec_jax.inference.evidence import evidence
from metarec_jax.inference.explain import Cause, Explanation, effects, rank_correlation
from metarec_jax.inference.export import export, export_vectors
from metarec_jax.inference.histories import History, encode_attributes, encode_history, is_one_user
from metarec_jax.inference.ranker import USERS, Explore, Ranker, diversify
from metarec_jax.inference.stock import Stock
from metarec_jax.metrics.ranking import SIZES, Lists, by_support, rank
from metarec_jax.metrics.scoring import Scores, score_tasks, summarise
from metarec_jax.models import MODELS, Model
from metarec_jax.state import saving
from metarec_jax.state.feedback import LONGEST, checked, checked_id, taste
from metarec_jax.state.store import Event, SqliteStore, Store, Stored, UserId, open_store
from metarec_jax.strategies import RANKING, RATING, STRATEGIES, Strategy
from metarec_jax.strategies.wrappers.labels import shifts_of_labels
from metarec_jax.strategies.wrappers.ranked import TABLES
from metarec_jax.strategies.wrappers.reweight import reweighted
from metarec_jax.strategies.wrappers.stack import MEMBERS, of_catalogue
from metarec_jax.tasks.batching import batches
from metarec_jax.tasks.candidates import Among, judged_on
from metarec_jax.tasks.candidates import candidates as draw
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.protocols import PROTOCOLS, Protocol, ratings_of
from metarec_jax.tasks.ranking import Known
from metarec_jax.tasks.ranking_protocols import NextItem, StrongGeneralisation
from metarec_jax.tasks.splits import ColdUsers, Split
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target
from metarec_jax.training.build import build, default_model
from metarec_jax.training.loop import EPOCHS, fit
from metarec_jax.training.transfer import carry_over
from metarec_jax.types import Params

if TYPE_CHECKING:
    import polars as pl

Where = Mapping[str, Any]
DEFAULT_STRATEGY = {"ranking": "stack", "click": "alpaca", "rating": "alpaca"}
CELLS = 1 << 20  # users x items scored at once
RATER = "rater"  # folder of `Recommender.rater` in that of a model


class Recommendation(NamedTuple):
    """One item: raw id, score (a click probability or a rating; of `ask`, how much it tells) and title, where known."""

    item: Any
    score: float
    title: str | None


class UncertainRecommendation(NamedTuple):
    """A `Recommendation` with the standard deviation of a rating (its noise included) or of a click's logit."""

    item: Any
    score: float
    title: str | None
    deviation: float


@dataclass(frozen=True, eq=False)
class Recommender:
    """A trained learner with the catalogue it was trained on.

    Attributes:
      strategy: the four pure functions.
      params: meta-trained parameters.
      catalogue: the dataset; after loading, one without interactions.
      target: ratings to targets.
      protocol: how users were split.
      seed: of the split.
      recipe: names and options of strategy and model, for `save`.
      limits: lowest and highest rating seen in training.
      history: training log, one dict an epoch.
      stock: the items that can be recommended, later ones included (default: those of the catalogue).
      users: what users did since, see `update` (default: kept in memory).
      half_life: seconds in which an event of `update` loses half its weight, counted back from its user's latest one;
        None: all weigh the same.
      version: of the saved model that this was loaded from.
      rater: of a ranking, the recommender that `predict` asks: how much an item would be liked. Its test users are
        those of the ranking: `rater.evaluate()`.
    """

    strategy: Strategy
    params: Params
    catalogue: Dataset
    target: Target
    protocol: Protocol
    seed: int
    recipe: dict[str, Any]
    limits: tuple[float, float]
    history: list[dict[str, float]] = field(default_factory=list)
    stock: Stock = None  # type: ignore[assignment]
    users: Store = field(default_factory=SqliteStore)
    half_life: float | None = None
    version: str | None = None
    rater: "Recommender | None" = None

    def __post_init__(self) -> None:
        if self.stock is None:
            object.__setattr__(self, "stock", Stock.of(self.catalogue))

    def __repr__(self) -> str:
        name = self.recipe["strategy"]["name"] or "a strategy of the caller"
        return f"Recommender({name}, {self.target.kind}, {len(self.stock) - 1:,} items, {len(self.history)} epochs)"

    def recommend(
        self,
        history: History | Sequence[History],
        k: int = 10,
        *,
        user: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        context: Mapping[str, Any] | None = None,
        exclude_seen: bool = True,
        where: Where | Sequence[Where] | None = None,
        only: Sequence[Any] | None = None,
        block: Sequence[Any] = (),
        diversity: float = 0.0,
        explore: Explore | None = None,
        strength: float = 1.0,
        seed: int = 0,
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
            to those above it takes away (MMR), among the 100 or 10 k best.
          explore: "ucb" ranks by score + strength * deviation, "thompson" by a draw from N(score, (strength
            deviation)^2), each item by itself; for strategies that know the deviation, as `alpaca`.
          strength, seed: of the exploration.
          deviation: give `UncertainRecommendation`s.
          approximate: find the best by `jax.lax.approx_max_k`: faster on a TPU, and may miss one in twenty.
          by: "score"; "rating", the rating that `predict` expects, which favours what few know and like much; or a
            share w from 0 to 1 of it: of the 100 or 10 k best by score, those with the largest (1 - w) z(score) +
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
        single, people = self._people(history, user)
        choice = _Choice(
            exclude_seen, where, only, block, diversity, explore, strength, seed, deviation, approximate, by
        )
        found = self._best(people, k, context, choice)
        return found[0] if single else found

    def predict(
        self,
        history: History | Sequence[History],
        items: Sequence[Any],
        *,
        user: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        context: Mapping[str, Any] | None = None,
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
        single, people = self._people(history, user)
        found = self._expected(people, items, context)
        return found[0] if single else found

    def predict_for(
        self, users: UserId | Sequence[UserId], items: Sequence[Any], *, context: Mapping[str, Any] | None = None
    ) -> Any:
        """What a user of the dataset or of `update`, or each of a list, would think of given items; see `predict`.

        Args:
          users: raw id or a list of ids, as of `recommend_to`; of one never seen nothing is known.
          items, context: see `predict`.

        Raises:
          DataError, ValueError: as `predict`; an id that is no integer or string.
          StoreError: the store cannot be read.
        """
        single, people = self._stored(users)
        found = self._expected(people, items, context)
        return found[0] if single else found

    def _expected(
        self, people: Sequence["_Person"], items: Sequence[Any], context: Mapping[str, Any] | None
    ) -> list[list[float]]:
        """Of each person the expected ratings, or click probabilities, of the items."""
        if not isinstance(items, Sequence | np.ndarray) or isinstance(items, str | bytes):
            raise DataError(f"items: expected a list of item ids, got {items!r}")
        asked = list(items)
        rows = self.stock.encode(asked)
        if (rows == UNKNOWN).any():
            raise DataError(
                f"item {asked[int((rows == UNKNOWN).argmax())]!r} is unknown; ask for items of the stock, or add it "
                "with add_items"
            )
        rater, found = self._rater(), []
        for start in range(0, len(people), USERS):
            chunk = people[start : start + USERS]
            known = rater._batch(chunk, context)
            adapted, scores = rater.ranker.adapt(known), np.zeros((len(chunk), len(rows)), np.float32)
            for first in range(0, len(rows), CELLS // USERS):
                some = rows[first : first + CELLS // USERS]
                padded = np.zeros((len(known.items), _bucket(len(some), 16)), np.int32)
                padded[:, : len(some)] = some
                tile = np.asarray(rater.ranker.scores(adapted, known, padded))
                scores[:, first : first + len(some)] = tile[: len(chunk), : len(some)]
            values = rater.target.decode(scores)
            found += (np.clip(values, *rater.limits) if rater.target.kind == "rating" else values).tolist()
        return found

    def _rater(self) -> "Recommender":
        """The recommender that knows how much an item is liked."""
        found = self if self.target.kind != "ranking" else self.rater
        if found is None:
            raise ValueError(
                "this recommender knows what users choose, not how much they like it: its data held one rating only, "
                "or it was trained with ratings=None; train on data with ratings of several values, "
                'mr.train(data, ratings="als")'
            )
        return found

    def _people(
        self,
        history: History | Sequence[History],
        user: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    ) -> tuple[bool, list["_Person"]]:
        """Whether it is one user, and the users encoded."""
        single = is_one_user(history)
        histories: list[Any] = [history] if single else list(history)
        attributes: Sequence[Any] = [user] if single else [None] * len(histories) if user is None else user  # type: ignore
        if isinstance(attributes, Mapping) or len(attributes) != len(histories):
            raise DataError(f"user: got attributes of {len(attributes)} users for {len(histories)} histories")
        people = []
        for i, (given, own) in enumerate(zip(histories, attributes, strict=True)):
            who = "history" if single else f"history {i}"
            rows, ratings = encode_history(given, self.stock, self.limits, who)
            people.append(_Person(rows, ratings, np.ones(len(rows), np.float32), self._attributes(own)))
        return single, people

    def recommend_to(
        self, users: UserId | Sequence[UserId], k: int = 10, *, context: Mapping[str, Any] | None = None, **choice: Any
    ) -> Any:
        """The `k` best items for a user of the dataset or of `update`, or for each of a list of users.

        Of a user of the dataset the interactions there count, and then the events of `update`. A loaded model holds no
        interactions, and knows the users of `update` alone.

        Args:
          users: raw id or a list of ids; one never seen gets the ranking of a user about whom nothing is known.
          k, context: see `recommend`.
          **choice: `exclude_seen` to `by` of `recommend`.

        Raises:
          DataError, ValueError: as `recommend`; an id that is no integer or string.
          StoreError: the store cannot be read.
        """
        single, people = self._stored(users)
        found = self._best(people, k, context, _Choice(**choice))
        return found[0] if single else found

    def recommend_all(
        self,
        k: int = 10,
        users: Sequence[UserId] | None = None,
        *,
        context: Mapping[str, Any] | None = None,
        **choice: Any,
    ) -> "pl.DataFrame":
        """The `k` best items of many users as a table: user_id, item_id, rank (from 1) and score.

        Args:
          k, context, **choice: see `recommend_to`.
          users: raw ids (default: all users of the dataset).

        Raises:
          DataError: as `recommend_to`; a loaded model, which holds no users, without `users`; `users` that is no list,
            or of several types.
        """
        import polars as pl

        if users is None and not len(self.catalogue.rating):
            raise DataError("a loaded model holds no users: recommend_all(k, users=[...])")
        if isinstance(users, str) or not isinstance(users, Iterable | None):
            raise DataError(f"users: expected a list of ids, got {users!r}")
        ids = self.catalogue.users.ids.tolist() if users is None else [checked_id(u, None, "user") for u in users]
        if len({type(user) for user in ids}) > 1:
            raise DataError("users: integers and strings are mixed; a column holds ids of one type")
        lists = self.recommend_to(ids, k, context=context, **choice) if ids else []
        text = [isinstance(ids[0], str) if ids else False, self.stock.trained.ids.dtype.kind == "U"]
        of_user, of_item = (pl.String if t else pl.Int64 for t in text)
        return pl.DataFrame(
            {
                "user_id": pl.Series([user for user, own in zip(ids, lists, strict=True) for _ in own], dtype=of_user),
                "item_id": pl.Series([r.item for own in lists for r in own], dtype=of_item),
                "rank": pl.Series([i for own in lists for i in range(1, len(own) + 1)], dtype=pl.Int64),
                "score": pl.Series([r.score for own in lists for r in own], dtype=pl.Float64),
            }
        )

    def similar_items(self, item: Any, k: int = 10) -> list[Recommendation]:
        """The `k` items most like a given one, whatever a user's taste.

        The score is the cosine of what the network computes of each item alone (`Ranker.vectors`): of the default, who
        chose them and what their fields say.

        Args:
          item: raw id.
          k: how many.

        Raises:
          DataError: an unknown item; a `k` that is no positive integer.
        """
        _checked_count(k)
        row = self._row_of_item(item)
        likeness = self._likeness @ self._likeness[row]
        likeness[[UNKNOWN, row]] = -np.inf
        rows = np.argsort(-likeness, kind="stable")[: min(k, len(likeness) - 2)]
        return self._readable(rows, likeness[rows])

    def _row_of_item(self, item: Any) -> int:
        (row,) = self.stock.encode([item])
        if row == UNKNOWN:
            raise DataError(f"item {item!r} is unknown; name one of the stock, or add it with add_items")
        return int(row)

    def _stored(self, users: UserId | Sequence[UserId]) -> tuple[bool, list["_Person"]]:
        """Whether it is one user, and what the store knows of the users."""
        single = isinstance(users, str) or not isinstance(users, Iterable)
        ids = [checked_id(u, None, "user") for u in ([users] if single else users)]  # type: ignore[union-attr, list-item]
        return single, self._known(ids)

    def update(self, events: Iterable[Event | Mapping[str, Any]]) -> int:
        """Keeps what users did; the next recommendation reflects it.

        Users and items may be new: a new item counts as an unknown one until `add_items` says what it is. Of several
        events of a user with the same item the latest counts.

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
        """Keeps a user's attributes, `{"age": 30}`, in place of those before.

        Raises:
          DataError: an attribute that the model does not know, or a value that it does not take.
        """
        self._attributes(attributes)
        self.users.describe(checked_id(user, None, "user"), attributes)

    def forget(self, user: UserId) -> int:
        """Removes every trace of a user from `users`; returns how many events there were. What the dataset holds of the
        user stays: train again without it."""
        return self.users.forget(checked_id(user, None, "user"))

    def explain(
        self,
        who: History | UserId,
        item: Any,
        *,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
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
        row = self._row_of_item(item)
        if isinstance(who, int | str | np.integer):
            if user is not None:
                raise DataError("user: the attributes of a user of update are given to describe_user")
            (person,) = self._known([checked_id(who, None, "user")])
        else:
            rows, ratings = encode_history(who, self.stock, self.limits, "history")
            person = _Person(rows, ratings, np.ones(len(rows), np.float32), self._attributes(user))
        rows, ratings, weights = (x[-LONGEST:] for x in person[:3])
        person = _Person(rows, ratings, weights, person.attributes)
        found = effects(self.ranker, self._batch([person], context), int(row))
        after, before, *without = self.target.decode(np.array([found.after, found.before, *found.without])).tolist()
        above, below = self.target.decode(found.after + np.array([1e-3, -1e-3]))
        causes = []
        for i, (own, rating) in enumerate(zip(person.rows.tolist(), person.ratings.tolist(), strict=True)):
            raw, _, title = self._readable(np.array([own]), np.zeros(1))[0] if own != UNKNOWN else (None, 0, None)
            causes.append(
                Cause(raw, title, rating, after - without[i], float(found.slopes[i] * (above - below) / 2e-3))
            )
        agreement = rank_correlation(after - np.array(without), found.slopes)
        causes.sort(key=lambda cause: -abs(cause.effect))
        fields = dict(sorted(found.fields.items(), key=lambda part: -abs(part[1])))
        ((raw, _, title),) = self._readable(np.array([row]), np.zeros(1))
        return Explanation(raw, title, after, before, causes, fields, agreement)

    def with_users(self, users: str | Path | Store, half_life: float | None = None) -> "Recommender":
        """The recommender with another store of what users did.

        Args:
          users: the path of a file (SQLite; made when there is none), `redis://host:port/database`, or a `Store`.
          half_life: seconds in which an event loses half its weight; None: all weigh the same.

        Raises:
          StoreError: the store cannot be opened.
          ValueError: `half_life` is not above 0.
        """
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be seconds above 0, or None, got {half_life}")
        return replace(self, users=open_store(users), half_life=half_life)

    def add_items(self, items: Mapping[str, Sequence[Any]]) -> "Recommender":
        """The recommender with more items, which their attributes tell; nothing of the others is computed again.

        Args:
          items: columns, `{"item_id": [...], "title": [...], "genres": [[...], ...]}`; a field left out is unknown.

        Raises:
          DataError: see `Stock.add`.
        """
        rater = self.rater and self.rater.add_items(items)
        other = replace(self, stock=self.stock.add(items), rater=rater)
        if "ranker" in self.__dict__:
            other.__dict__["ranker"] = self.ranker.extended(other.stock)
        return other

    @cached_property
    def ranker(self) -> Ranker:
        """What ranks the stock; it keeps what the network computes of the items alone."""
        return Ranker(self.strategy, self.params, self.stock, self.catalogue.user_fields, self.catalogue.context_fields)

    def evaluate(
        self,
        data: Dataset | None = None,
        *,
        support: int | None = None,
        candidates: Among = "query",
        baselines: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Metrics on the test tasks of the protocol, beside the plain baselines on the same tasks.

        The users of these tasks were never seen in training with `ColdUsers`; other protocols may judge known users.

        Args:
          data: the dataset of the training; may be left out unless the model was loaded.
          support: largest support size (default: all that a user has besides the query).
          candidates: of clicks, among what the query is ranked: "query", its own items; a number, so many sampled
            items besides that the user has no interaction with; "all", all such items. They count as not clicked.
          baselines: compute two means, ALS fold-in and item-kNN too; where clicks are made from ratings, also the same
            three of ratings.

        Returns:
          `{learner: {metric: value}}`.

        Raises:
          DataError: a loaded model without `data`, or data that do not fit.
          ValueError: `candidates` other than "query" for ratings, or an unknown one.
        """
        if self.target.kind == "ranking":
            return self._ranking_table(data, support, baselines)
        scores = self.scores(data, support=support, candidates=candidates, baselines=baselines)
        return {learner: summarise(found, self.target.kind) for learner, found in scores.items()}

    def rankings(
        self, data: Dataset | None = None, *, sizes: Sequence[int | None] = SIZES, baselines: bool = True
    ) -> dict[str, dict[str, np.ndarray]]:
        """`[users]` of each metric of a ranking, by learner: every test user, and all items but the support.

        Args:
          data: the dataset of the training; may be left out unless the model was loaded.
          sizes: support sizes, None for all; see `metarec_jax.metrics.ranking.by_support`.
          baselines: popularity, item-kNN, EASE and iALS too, tuned on the validation users; see `ranking_baselines`.

        Raises:
          DataError: a loaded model without `data`, or data that do not fit.
          ValueError: the recommender does not rank.
        """
        if self.target.kind != "ranking":
            raise ValueError('this recommender predicts clicks or ratings: train with objective="ranking"')
        split, query = self.split(data, "evaluate(data)"), self.protocol.query
        name = self.recipe["strategy"]["name"] or "strategy"

        def ours(size: int | None) -> Lists:
            return rank(self.strategy, self.params, split.test, self.target, query=query, support=size)

        found = {name: by_support(ours, sizes)}
        if baselines:
            found |= ranking_baselines(split, self.target, sizes=sizes, query=query)
        return found

    def _ranking_table(self, data: Dataset | None, support: int | None, baselines: bool) -> dict[str, dict[str, float]]:
        sizes = SIZES if support is None else (support,)
        found = self.rankings(data, sizes=sizes, baselines=baselines)
        return {
            learner: {name: float(np.nanmean(values)) for name, values in table.items()}
            for learner, table in found.items()
        }

    def scores(
        self,
        data: Dataset | None = None,
        *,
        support: int | None = None,
        candidates: Among = "query",
        baselines: bool = True,
    ) -> dict[str, Scores]:
        """What `evaluate` summarises: every test user's scores by learner; arguments as there."""
        if self.target.kind == "ranking":
            raise ValueError("this recommender ranks the catalogue: see rankings(), or train for clicks or ratings")
        split, query = self.split(data, "evaluate(data)"), self.protocol.query
        test, longest = split.test, int(np.maximum(split.test.lengths - query, 1).max())
        width = -(-longest // 32) * 32  # splits and support sizes share their shapes, hence what is compiled
        judged = draw(test, self.target, candidates, query=query)
        size = min(len(test), max(1, CELLS // judged.item.shape[1]))
        tasks = (
            judged_on(batch, test, judged)
            for batch in batches(test, self.target, query=query, support=support, batch_size=size, buckets=(width,))
        )
        name = self.recipe["strategy"]["name"] or "strategy"
        results = {name: score_tasks(self.strategy, self.params, tasks, self.target)}
        if baselines:
            options: dict[str, Any] = {"query": query, "support": support, "among": candidates}
            results |= score_baselines(split.train, test, self.target, **options)
        return results

    def adaptation_cost(self, data: Dataset | None = None, *, users: int = 256, repeats: int = 5) -> tuple[float, int]:
        """What adapting costs: milliseconds a user and bytes of one adapted user.

        The time is the median of `repeats` runs of the compiled `adapt` on a batch of `users` support sets, which are
        those of the test users.
        """
        test = self.split(data, "adaptation_cost(data)").test
        if self.target.kind == "ranking":
            raise ValueError(
                "the cost of adapting is measured on clicks and ratings; benchmarks/serving.py has rankings"
            )
        width = -(-int(np.maximum(test.lengths - self.protocol.query, 1).max()) // 32) * 32
        options: dict[str, Any] = {"query": self.protocol.query, "batch_size": len(test), "buckets": (width,)}
        (batch,) = batches(test, self.target, **options)
        support = jax.tree.map(lambda x: jnp.asarray(np.resize(x, (users, *x.shape[1:]))), batch.task.support)
        adapt, key = jax.jit(self.strategy.adapt), jax.random.key(0)
        adapted = jax.block_until_ready(adapt(self.params, support, key))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(adapt(self.params, support, key))
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds)) / users * 1e3, sum(x.nbytes for x in jax.tree.leaves(adapted)) // users

    def ask(self, k: int = 10, data: Dataset | None = None) -> list[Recommendation]:
        """The `k` items to ask a new user about first, most telling first: MeLU's evidence candidates.

        Those that many training users have rated and whose ratings, each taken alone, move the adapted parameters
        the most; see `metarec_jax.inference.evidence`, which is also what the scores are.

        Args:
          k: how many; fewer come back when fewer items have ratings.
          data: the dataset of the training; may be left out unless the model was loaded.

        Raises:
          DataError: a loaded model without `data`, or data that do not fit.
          ValueError: the strategy adapts nothing.
        """
        _checked_count(k)
        value = evidence(self.strategy, self.params, self.split(data, "ask(k, data)").train, self.target)
        rows = np.argsort(-value, kind="stable")[: min(k, np.count_nonzero(value))]
        return self._readable(rows, value[rows])

    def save(self, path: str | Path) -> None:
        """Write the model as a folder of JSON and safetensors files; an earlier model there is replaced at once.

        Raises:
          ModelFileError: something that is no model stands there.
        """
        config = {
            "recipe": self.recipe,
            "target": asdict(self.target),
            "protocol": {"name": type(self.protocol).__name__} | asdict(self.protocol),
            "seed": self.seed,
            "limits": self.limits,
            "history": self.history,
        }
        parts = {} if self.rater is None else {RATER: self.rater.save}
        saving.write(path, config, self.catalogue, self.params, self.stock, parts)

    def export(self, folder: str | Path, **options: Any) -> None:
        """Writes adapting and recommending as a function that JAX alone can run; see `inference.export`."""
        export(self, folder, **options)

    def export_vectors(self, path: str | Path) -> None:
        """Writes the items' vectors as Parquet or npz; see `metarec_jax.inference.export.export_vectors`."""
        export_vectors(self, path)

    def split(self, data: Dataset | None = None, call: str = "split(data)") -> Split:
        """The split of the training; `call` is what to write where a loaded model needs the dataset."""
        if data is None and not len(self.catalogue.rating):
            raise DataError(f"a loaded model holds no interactions: {call} with the dataset it was trained on")
        return self.protocol.split(self.catalogue if data is None else self._as_trained(data), self.seed)

    def _readable(self, rows: np.ndarray, scores: np.ndarray) -> list[Recommendation]:
        """Item rows `[k]` with their scores as people read them."""
        titles = [None] * len(rows) if self.stock.titles is None else self.stock.titles[rows]
        raw = self.stock.decode(rows).tolist()
        return [Recommendation(*r) for r in zip(raw, scores.tolist(), titles, strict=True)]

    def _as_trained(self, data: Dataset) -> Dataset:
        """The interactions of `data` with the item features of the training, or an error when the two do not fit."""
        known, given = (
            {n: (f.kind, f.size, f.vocabulary and f.vocabulary.ids.tolist()) for n, f in fields_of(d).items()}
            for d in (self.catalogue, data)
        )
        around = [{f.name for f in d.context_fields} for d in (self.catalogue, data)]
        same_fields = around[0] == around[1] and all(known.get(name) == field for name, field in given.items())
        if not np.array_equal(self.catalogue.items.ids, data.items.ids) or not same_fields:
            raise DataError(
                f"{data.name} does not have the items and fields of the training data ({self.catalogue.name}); "
                "evaluate it on the same dataset, or train a new model"
            )
        return replace(data, item_fields=self.catalogue.item_fields, item_features=self.catalogue.item_features)

    def _attributes(self, given: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        return encode_attributes(given, self.catalogue.user_fields)

    def _known(self, users: Sequence[UserId]) -> list["_Person"]:
        """Users of the dataset and of the store, encoded: the interactions of the former come before the latter's."""
        found = []
        for user, person in zip(users, self.users.read(users, LONGEST), strict=True):
            row = self._row_of(user)
            events = self._interactions(row) + person.events
            items, ratings, weights = taste(events, self.limits, self.target.threshold, self.half_life)
            try:
                attributes = self._attributes(person.attributes)
                if row != UNKNOWN and not person.attributes:
                    attributes = {name: table[row] for name, table in self.catalogue.user_features.items()}
                found.append(_Person(self.stock.encode(items), ratings, weights, attributes))
            except DataError as error:
                raise DataError(f"user {user!r}, as kept by the store: {error}") from error
        return found

    def _row_of(self, user: UserId) -> int:
        """The row of a user of the dataset, 0 where there is none or the interactions are not at hand."""
        ids = self.catalogue.users
        same = ids.ids.dtype.kind == ("U" if isinstance(user, str) else "i")
        if not len(self.catalogue.rating) or ids.buckets is not None or not same:
            return UNKNOWN
        return int(ids.encode([user])[0])

    def _interactions(self, row: int) -> list[Stored]:
        """What a user of the dataset did, in the order of time."""
        if row == UNKNOWN:
            return []
        data = self.catalogue
        span = np.searchsorted(data.user, np.array([row, row + 1], data.user.dtype), sorter=data.by_user)
        index = data.by_user[slice(*span)][-LONGEST:]
        items = data.items.decode(data.item[index]).tolist()
        each = zip(items, data.rating[index].tolist(), data.timestamp[index].tolist(), strict=True)
        return [Stored(item, "rating", rating, float(time)) for item, rating, time in each]

    def _batch(self, people: Sequence["_Person"], context: Mapping[str, Any] | None) -> Known:
        """The people as arrays of a few fixed shapes."""
        data, around = self.catalogue, encode_attributes(context, self.catalogue.context_fields, "context")
        width = _bucket(min(max(len(p.rows) for p in people), LONGEST), 8)
        known = Known.blank(_bucket(len(people), 1), width, data.user_fields, data.context_fields)
        for i, person in enumerate(people):
            rows, ratings, weights = (x[-LONGEST:] for x in person[:3])
            known.items[i, : len(rows)], known.target[i, : len(rows)] = rows, self.target.grade(ratings)
            known.weight[i, : len(rows)] = weights
            for name, value in person.attributes.items():
                known.user[name][i] = value
        for name, value in around.items():
            known.context[name][:] = value
        return known

    def _best(
        self,
        people: Sequence["_Person"],
        k: int,
        context: Mapping[str, Any] | None,
        choice: "_Choice",
    ) -> list[list[Any]]:
        """Of each person the recommendations, best first."""
        if choice.by != "score" and self.target.kind == "click":
            raise ValueError(f'by={choice.by!r} needs ratings, and this recommender predicts clicks: by="score"')
        if choice.by == "rating":
            rater = self._rater()
            lists, (low, high) = rater._best(people, k, context, replace(choice, by="score")), rater.limits
            return [[r._replace(score=min(max(r.score, low), high)) for r in found] for found in lists]
        _checked_count(k)
        where = choice.where
        wheres: list[Any] = [where] if where is None or isinstance(where, Mapping) else list(where)
        if len(wheres) not in (1, len(people)):
            raise DataError(f"where: got {len(wheres)} conditions for {len(people)} users")
        masks = [self.stock.allowed(w, choice.only) for w in wheres]
        allowed = None
        if any(m is not None for m in masks):
            allowed = np.stack([np.ones(len(self.stock), bool) if m is None else m for m in masks])
        blocked = self.stock.encode(list(choice.block)) if len(choice.block) else np.zeros(0, np.int32)
        mixed = choice.by != "score"
        wanted = max(10 * k, 100) if choice.diversity or mixed else k
        found: list[list[Any]] = []
        for start in range(0, len(people), USERS):
            chunk = people[start : start + USERS]
            known = self._batch(chunk, context)
            longest = _bucket(max(len(p.rows) for p in chunk) + len(blocked), 8)
            seen = np.full((len(known.items), longest), -1, np.int32)
            seen[:, : len(blocked)] = blocked
            if choice.exclude_seen:
                for i, person in enumerate(chunk):
                    seen[i, len(blocked) : len(blocked) + len(person.rows)] = person.rows
            group = np.zeros(len(known.items), np.int32)
            if len(wheres) > 1:
                group[: len(chunk)] = np.arange(start, start + len(chunk))
            ranked = self.ranker.top(
                known, max(16, 1 << (wanted - 1).bit_length()), seen=seen, allowed=allowed, group=group,
                deviation=choice.deviation, explore=choice.explore, strength=choice.strength,
                approximate=choice.approximate, key=jax.random.fold_in(jax.random.key(choice.seed), start),
            )  # fmt: skip
            shown = np.array(self.target.decode(ranked.scores))
            if mixed:
                rater = self._rater()
                rated = rater._batch(chunk, context)
                liking = np.asarray(rater.ranker.scores(rater.ranker.adapt(rated), rated, ranked.rows))
            for i in range(len(chunk)):
                kept = np.flatnonzero(np.isfinite(ranked.scores[i]))[:wanted]
                if mixed:
                    share = float(choice.by)
                    worth = (1 - share) * _standardised(shown[i, kept]) + share * _standardised(liking[i, kept])
                    kept = kept[np.argsort(-worth, kind="stable")]
                    shown[i, kept] = np.sort(worth)[::-1]
                if not choice.diversity:
                    kept = kept[:k]
                else:
                    kept = kept[diversify(ranked.rows[i, kept], shown[i, kept], self._likeness, k, choice.diversity)]
                picked: list[Any] = self._readable(ranked.rows[i, kept], shown[i, kept])
                if choice.deviation and ranked.deviations is not None:
                    spread = ranked.deviations[i, kept] * (self.target.scale if self.target.kind == "rating" else 1.0)
                    both = zip(picked, spread.tolist(), strict=True)
                    picked = [UncertainRecommendation(p.item, p.score, p.title, d) for p, d in both]
                found.append(picked)
        return found

    @cached_property
    def _likeness(self) -> np.ndarray:
        """`[rows, width]` vectors of length 1, whose products say how alike items are."""
        vectors = self.ranker.vectors()
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class _Choice:
    """What may be recommended and in which order; see `Recommender.recommend`."""

    exclude_seen: bool = True
    where: Where | Sequence[Where] | None = None
    only: Sequence[Any] | None = None
    block: Sequence[Any] = ()
    diversity: float = 0.0
    explore: Explore | None = None
    strength: float = 1.0
    seed: int = 0
    deviation: bool = False
    approximate: bool = False
    by: Literal["score", "rating"] | float = "score"

    def __post_init__(self) -> None:
        share = isinstance(self.by, int | float) and not isinstance(self.by, bool)
        if self.by not in ("score", "rating") and not (share and 0 <= float(self.by) <= 1):
            raise ValueError(f'by is "score", "rating" or a share from 0 to 1, got {self.by!r}')
        if share and self.explore is not None:
            raise ValueError(f'explore goes with by="score" or by="rating", got by={self.by!r}, which orders anew')
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity is a share from 0 to 1, got {self.diversity}")
        if self.explore not in (None, "ucb", "thompson"):
            raise ValueError(f"explore must be 'ucb' or 'thompson', got {self.explore!r}")


class _Person(NamedTuple):
    """One user, encoded: item rows, ratings and weights `[n]`, and attributes."""

    rows: np.ndarray
    ratings: np.ndarray
    weights: np.ndarray
    attributes: dict[str, np.ndarray]


def _checked_count(k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise DataError(f"k must be a positive integer, got {k!r}")


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-9) if len(values) else values


def train(
    data: Dataset | Any,
    strategy: str | Callable[..., Strategy] | None = None,
    model: str | Callable[..., Model] | None = None,
    *,
    objective: str | Ranking | None = None,
    seed: int = 0,
    protocol: Protocol | None = None,
    graded: bool = True,
    ratings: str | None = "als",
    strategy_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    start: Recommender | None = None,
    shared: Collection[str] | None = None,
    progress: bool = True,
    tensorboard: str | Path | None = None,
    **fit_options: Any,
) -> Recommender:
    """Meta-train a recommender on a dataset.

    Args:
      data: from `metarec_jax.data`; or a table as of `metarec_jax.data.from_tables`, with the columns user_id, item_id
        and, where there are any, rating and timestamp.
      strategy: a name in `metarec_jax.strategies.STRATEGIES` or `RANKING`, or a function `(model, loss=...) ->
        Strategy`; by default "stack" to rank and "alpaca" for clicks and ratings.
      model: a name in `metarec_jax.models.MODELS`, or a function `(fields) -> Model`; by default what
        `metarec_jax.strategies.DEFAULT_MODEL` says of the strategy, else "mlp".
      objective: "ranking", which item of the whole catalogue a user chooses, or a `Ranking` with settings of it;
        "click", the probability that a shown item is liked; "rating". Default: the protocol's target, and "ranking"
        without a protocol.
      seed: of the split, the parameters and the sampling; same seed, same machine: same model.
      protocol: which users train, validate and test (default: `StrongGeneralisation` to rank, else `ColdUsers`).
      graded: where clicks are made from ratings, learn what each rating of a support set tells of the user, and show
        the mean rating of an item beside its share of clicks; else a rating counts as a click or none.
      ratings: of a ranking where the data hold ratings of several values, the name of the strategy that `predict`
        asks, trained on the same users with its own options as they are (`Recommender.rater`); None: no `predict`.
      strategy_options, model_options: keyword arguments of the two.
      start: a recommender trained on other data, to start from its parameters instead of random ones. Rows of tables
        are carried over where both know the raw value (an item id, a genre), layers where their shapes are the same.
      shared: with `start`, the fields whose raw values mean the same in both datasets, by the names of
        `metarec_jax.models.fields_of` (default: all that both have). Leave out "item_id" where the same number is
        another item.
      progress: show a progress bar.
      tensorboard: a folder for event files with each epoch's loss and validation metrics.
      **fit_options: other keyword arguments of `metarec_jax.training.fit`, for instance `epochs`, `optimizer` or
        `checkpoint`; what is predicted and the query size are the protocol's.

    Raises:
      DataError: the dataset has too few users for the protocol; all ratings of the training users are clicks, or none.
      ValueError: an unknown name; `start` was trained for another target, or with another strategy or model; `shared`
        without `start`.
      TypeError: `data` is a name; `start` is no recommender; an argument that the protocol has, or that nothing has.
      FloatingPointError: the loss is no longer finite.
      ModelFileError: `checkpoint` is damaged or of another training.
      ModuleNotFoundError: `tensorboard` needs a package that is missing.
    """
    for name in ("target", "query"):
        if name in fit_options:
            raise TypeError(f"`{name}` is the protocol's: train(..., protocol=mr.ColdUsers({name}=...))")
    if isinstance(data, str | Path):
        raise TypeError(f"train takes a dataset or a table, not a name: mr.data.load({str(data)!r})")
    if not isinstance(data, Dataset):
        data = from_tables(data)
    protocol, ranking = _asked(objective, protocol)
    if ranking is not None:
        fit_options["objective"] = ranking
    if ratings is not None and ratings not in STRATEGIES | RATING:
        raise ValueError(f"ratings: {ratings!r} is unknown; choose from {', '.join(RATING | STRATEGIES)}, or None")
    if strategy is None:
        strategy = DEFAULT_STRATEGY[protocol.target]
    model = default_model(strategy) if model is None else model
    split = protocol.split(data, seed)
    target = Target.fit(protocol, split.train, graded)
    statistics = ItemStatistics.fit(split.train, target)
    given, data = data, statistics.extend(data)
    split = Split(*(replace(part, data=data) for part in split))
    if progress:
        print(_who_trains(split, protocol))
    if strategy == "stack":
        own = dict(strategy_options or {})
        strategy_options = own | of_catalogue(fields_of(data)["item_id"].size, own.get("members"), own.get("options"))
    recipe = {"strategy": saving.part(strategy, strategy_options), "model": saving.part(model, model_options)}
    built = build(strategy, strategy_options, model, model_options, data, target)
    if start is None and shared is not None:
        raise ValueError("`shared` names fields that are shared with the data of `start`: give both or none")
    if start is not None:
        if not isinstance(start, Recommender):
            raise TypeError(f"start must be a Recommender, got {type(start).__name__}; a saved one: mr.load(path)")
        if start.target.kind != target.kind:
            raise ValueError(f"start predicts a {start.target.kind}, this training a {target.kind}; use one target")
        fresh = jax.jit(built.init)(jax.random.key(seed))
        learned = {name: value for name, value in start.params.items() if name != TABLES}
        fit_options["params"] = carry_over(learned, fresh, fields_of(start.catalogue), fields_of(data), shared)
    told = [fit_options.pop("report", None)]
    progress = progress and bool(jax.tree.leaves(jax.eval_shape(built.init, jax.random.key(0))))  # there are epochs
    with (
        epochs_bar(progress, fit_options.get("epochs") or EPOCHS[target.kind], target.kind) as bar,
        event_files(tensorboard) as events,
    ):
        told += [bar, events]

        def report(epoch: int, entry: dict[str, float]) -> None:
            for tell in filter(None, told):
                tell(epoch, entry)

        fitted = fit(
            built,
            split,
            target,
            query=protocol.query,
            statistics=statistics,
            seed=seed,
            report=report,
            told={**recipe, "data": fingerprint(data)} if fit_options.get("checkpoint") else None,
            **fit_options,
        )
    rating = data.rating[split.train.index]
    lowest, highest = float(rating.min()), float(rating.max())
    if target.kind == "ranking" and lowest >= target.threshold:
        lowest = target.threshold - 1  # a dismissal must not count as a positive
    rater = None
    if target.kind == "ranking" and ratings is not None and np.ptp(given.rating) > 0:
        rater = train(given, ratings, seed=seed, protocol=ratings_of(protocol), progress=False)
    return Recommender(
        built,
        fitted.params,
        data,
        target,
        protocol,
        seed,
        recipe,
        (lowest, highest),
        fitted.history,
        rater=rater,
    )


def _who_trains(split: Split, protocol: Protocol) -> str:
    """What of a dataset a training uses, in words."""
    data = split.train.data
    used, sizes = len(np.unique(split.train.index)), [len(np.unique(part.users)) for part in split]
    left_out = len(data.users) - 1 - len(np.unique(np.concatenate([part.users for part in split])))
    name = type(protocol).__name__
    return (
        f"{name}: {sizes[0]:,} users train on {used:,} of {len(data.rating):,} interactions, {sizes[1]:,} validate, "
        f"{sizes[2]:,} test" + (f"; {left_out:,} users have too few interactions for {name}" if left_out else "")
    )


def _asked(objective: str | Ranking | None, protocol: Protocol | None) -> tuple[Protocol, Ranking | None]:
    """The protocol and the ranking objective that are meant; None of the latter for clicks and ratings."""
    kind = "ranking" if isinstance(objective, Ranking) else objective
    if kind not in (None, "ranking", "click", "rating"):
        raise ValueError(f'objective is "ranking", "click", "rating" or a Ranking, got {objective!r}')
    if protocol is None:
        protocol = StrongGeneralisation() if kind in (None, "ranking") else ColdUsers(target=kind)  # type: ignore[arg-type]
    elif kind is not None and kind != protocol.target:
        if isinstance(protocol, StrongGeneralisation | NextItem):
            raise ValueError(f'{type(protocol).__name__} judges rankings; objective="{kind}" needs another protocol')
        protocol = replace(protocol, target=kind)  # type: ignore[arg-type]
    if protocol.target != "ranking":
        return protocol, None
    return protocol, objective if isinstance(objective, Ranking) else Ranking()


def load(
    path: str | Path,
    *,
    strategy: Callable[..., Strategy] | None = None,
    model: Callable[..., Model] | None = None,
    users: str | Path | Store | None = None,
    half_life: float | None = None,
) -> Recommender:
    """A recommender from a folder that `Recommender.save` wrote.

    Args:
      path: the folder.
      users, half_life: see `Recommender.with_users` (default: an empty store in memory).
      strategy, model: the functions given to `train`, when they were given as functions and not by name; or, where
        a name had options that JSON cannot hold, its function with them bound (`functools.partial`).

    Raises:
      ModelFileError: no model, a damaged one, one of another version, or one that needs `strategy` or `model`.
    """
    config, catalogue, stock, arrays = saving.read(path)
    levels = config["target"].get("levels")
    recipe, target = config["recipe"], Target(**config["target"] | {"levels": levels and tuple(levels)})
    chosen: dict[str, Any] = {}
    choices: list[Any] = [("strategy", strategy, STRATEGIES | RANKING | RATING), ("model", model, MODELS)]
    for what, given, known in choices:
        name = recipe[what]["name"]
        if given is None and name not in known:
            raise ModelFileError(
                f"{path}: its {what} is {name or 'a function of the caller, or had options that no file holds'}; "
                f"load it with load(path, {what}=...)"
            )
        options = recipe[what]["options"] if given is None else None
        if given is None and name == "stack" and "members" not in (options or {}):  # saved before they were kept
            weights = [key for key in arrays if key.startswith("params['weights']")]
            options = {**(options or {}), "members": list(MEMBERS)[: len(weights)]}
        chosen |= {what: given or name, f"{what}_options": options}
    built = build(**chosen, data=catalogue, target=target)
    built = reweighted(built) if recipe.get("reweighted") else built
    if target.levels is not None:
        arrays |= shifts_of_labels(arrays, target.encode(np.array(target.levels)))
    params = saving.restore_params(arrays, jax.eval_shape(built.init, jax.random.key(0)), path)
    if any(name.startswith(f"params[{TABLES!r}]") for name in arrays):
        params = {**params, TABLES: saving.restore_tree(arrays, f"params[{TABLES!r}]", path)}
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["protocol"].items()}
    protocol = PROTOCOLS[settings.pop("name", "ColdUsers")](**settings)
    part = config.get("parts", {}).get(RATER)
    rater = None if part is None else load(Path(path) / RATER)
    if rater is not None and not part.startswith(rater.version):
        raise ModelFileError(f"{path}: it was replaced while it was read; load it again")
    found = Recommender(
        built,
        params,
        catalogue,
        target,
        protocol,
        config["seed"],
        recipe,
        tuple(config["limits"]),
        config["history"],
        stock,
        version=config["version"],
        rater=rater,
    )
    if users is None and half_life is None:
        return found
    return found.with_users(":memory:" if users is None else users, half_life)


def _bucket(n: int, smallest: int) -> int:
    """The smallest of `smallest`, 4 `smallest`, 16 `smallest`, ... that is at least `n`: few shapes, few
    compilations."""
    size = smallest
    while size < n:
        size *= 4
    return size
