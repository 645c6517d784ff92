"""Predictor: a trained model over the items that can be recommended, for users as they are known now."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError
from metarec_jax.inference.explain import Cause, Explanation, effects, rank_correlation
from metarec_jax.inference.histories import History, encode_attributes, encode_history, is_one_user
from metarec_jax.inference.ranker import BATCHES, HISTORIES, USERS, Ranked, Ranker
from metarec_jax.inference.recommendations import Choice, Recommendation, UncertainRecommendation, checked_count
from metarec_jax.inference.rerank import diversify
from metarec_jax.inference.stock import Stock
from metarec_jax.tasks.ranking import LONGEST, Known
from metarec_jax.training.trained import Trained

CELLS = 1 << 20  # users x items scored at once
CANDIDATES = 100, 1000  # that are ranked again, at least and at most
Attributes = Mapping[str, Any] | None


class EncodedUser(NamedTuple):
    """One user, encoded: item rows, ratings and weights `[n]`, and attributes."""

    rows: np.ndarray
    ratings: np.ndarray
    weights: np.ndarray
    attributes: dict[str, np.ndarray]


class Predictor:
    """Answers for users who are given as `EncodedUser`s; holds what the network computes of the items alone.

    Attributes:
      trained: the model.
      stock: the items that can be recommended, later ones included.
      ranker: ranks the stock.
      rater: the predictor of expected ratings of a ranking, or None.
    """

    def __init__(
        self,
        trained: Trained,
        stock: Stock | None = None,
        rater: "Predictor | None" = None,
        ranker: Ranker | None = None,
    ) -> None:
        self.trained, self.catalogue, self.target = trained, trained.catalogue, trained.target
        self.stock = Stock.of(trained.catalogue) if stock is None else stock
        self.rater = Predictor(trained.rater) if rater is None and trained.rater is not None else rater
        self._ranker = ranker

    @cached_property
    def ranker(self) -> Ranker:
        if self._ranker is not None:
            return self._ranker
        fields = self.catalogue.user_fields, self.catalogue.context_fields
        return Ranker(self.trained.strategy, self.trained.params, self.stock, *fields)

    def extended(self, items: Mapping[str, Sequence[Any]]) -> "Predictor":
        """The predictor of a stock with more items, see `Stock.add`; what was computed of the others stays."""
        stock, rater = self.stock.add(items), self.rater and self.rater.extended(items)
        ranker = self.ranker.extended(stock) if "ranker" in self.__dict__ else None
        return Predictor(self.trained, stock, rater, ranker)

    def people(self, history: Any, user: Any) -> tuple[bool, list[EncodedUser]]:
        """Whether it is one user, and the users encoded; see `metarec_jax.Recommender.recommend`."""
        single = is_one_user(history)
        histories: list[Any] = [history] if single else list(history)
        attributes: Sequence[Any] = [user] if single else [None] * len(histories) if user is None else user
        if isinstance(attributes, Mapping) or len(attributes) != len(histories):
            raise DataError(f"user: got attributes of {len(attributes)} users for {len(histories)} histories")
        names = ["history"] if single else [f"history {i}" for i in range(len(histories))]
        given = zip(histories, attributes, names, strict=True)
        return single, [self.person(history, own, name) for history, own, name in given]

    def person(self, history: History, attributes: Attributes = None, name: str = "history") -> EncodedUser:
        """One user from a history; `name` begins the message of an error."""
        rows, ratings = encode_history(history, self.stock, self.trained.limits, name)
        return EncodedUser(rows, ratings, np.ones(len(rows), np.float32), self.attributes(attributes))

    def attributes(self, given: Attributes) -> dict[str, np.ndarray]:
        """Encoded attributes of one user."""
        return encode_attributes(given, self.catalogue.user_fields)

    def top(
        self, people: Sequence[EncodedUser], k: int, context: Mapping[str, Any] | None, choice: Choice
    ) -> list[list[Any]]:
        """Of each user the recommendations, best first."""
        if choice.by != "score" and self.target.kind == "click":
            raise ValueError(f'by={choice.by!r} needs ratings, and this recommender predicts clicks: by="score"')
        if choice.by == "rating":
            rater = self.needed_rater()
            lists, (low, high) = rater.top(people, k, context, replace(choice, by="score")), rater.trained.limits
            return [[r._replace(score=min(max(r.score, low), high)) for r in own] for own in lists]
        checked_count(k)
        allowed = self._allowed(choice, len(people))
        wanted = max(k, min(max(10 * k, CANDIDATES[0]), CANDIDATES[1])) if choice.reranks else k
        lists = []
        for start in range(0, len(people), USERS):
            chunk = people[start : start + USERS]
            ranked, scores = self._ranked(chunk, start, wanted, context, choice, allowed)
            for i in range(len(chunk)):
                kept = np.flatnonzero(np.isfinite(ranked.scores[i]))[:wanted]
                kept = self._reranked(ranked.rows[i], scores[i], kept, k, choice)
                lists.append(self._shown(ranked, scores, i, kept, choice.deviation))
        return lists

    def _allowed(self, choice: Choice, users: int) -> np.ndarray | None:
        """`[1 or users, rows]` which items each user may get; None where all may."""
        where = choice.where
        wheres: list[Any] = [where] if where is None or isinstance(where, Mapping) else list(where)
        if len(wheres) not in (1, users):
            raise DataError(f"where: got {len(wheres)} conditions for {users} users")
        masks = [self.stock.allowed(w, choice.only) for w in wheres]
        if all(mask is None for mask in masks):
            return None
        return np.stack([np.ones(len(self.stock), bool) if mask is None else mask for mask in masks])

    def _ranked(
        self,
        chunk: Sequence[EncodedUser],
        start: int,
        wanted: int,
        context: Mapping[str, Any] | None,
        choice: Choice,
        allowed: np.ndarray | None,
    ) -> tuple[Ranked, np.ndarray]:
        """The best of the stock for some users, and the scores to rank by again."""
        blocked = self.stock.encode(list(choice.block)) if len(choice.block) else np.zeros(0, np.int32)
        known = self.batch(chunk, context)
        longest = _bucket(max(len(p.rows) for p in chunk) + len(blocked), 1024)
        seen = np.full((len(known.items), longest), -1, np.int32)
        seen[:, : len(blocked)] = blocked
        if choice.exclude_seen:
            for i, person in enumerate(chunk):
                seen[i, len(blocked) : len(blocked) + len(person.rows)] = person.rows
        users, group, seeds = len(known.items), None, np.zeros(len(known.items), np.uint32)
        if choice.explore == "thompson":
            seeds[: len(chunk)] = choice.seeds(start, len(chunk))
        if allowed is not None and len(allowed) > 1:  # a mask for each user of the batch
            allowed, group = allowed[start : start + len(chunk)], np.arange(users, dtype=np.int32)
            allowed = np.pad(allowed, ((0, users - len(chunk)), (0, 0)))
        ranked = self.ranker.top(
            known, _bucket(wanted, 16, 8), seen=seen, allowed=allowed, group=group,
            deviation=choice.deviation, explore=choice.explore, strength=choice.strength,
            approximate=choice.approximate, seeds=seeds,
        )  # fmt: skip
        scores = np.array(self.target.decode(ranked.scores))
        if choice.by != "score":  # a share of the rating
            share, rater = float(choice.by), self.needed_rater()
            rated = rater.batch(chunk, context)
            ratings = np.asarray(rater.ranker.scores(rater.ranker.adapt(rated), rated, ranked.rows))
            for i in range(len(chunk)):
                kept = np.flatnonzero(np.isfinite(ranked.scores[i]))[:wanted]
                scores[i, kept] = (1 - share) * _standardised(scores[i, kept]) + share * _standardised(ratings[i, kept])
        return ranked, scores

    def _reranked(self, rows: np.ndarray, scores: np.ndarray, kept: np.ndarray, k: int, choice: Choice) -> np.ndarray:
        """Places of the `k` recommendations among the candidates `kept` of one user."""
        if choice.by != "score":
            kept = kept[np.argsort(-scores[kept], kind="stable")]
        if not choice.diversity:
            return kept[:k]
        return kept[diversify(rows[kept], scores[kept], self._likeness, k, choice.diversity)]

    def _shown(self, ranked: Ranked, scores: np.ndarray, i: int, kept: np.ndarray, deviation: bool) -> list[Any]:
        shown = self.readable(ranked.rows[i, kept], scores[i, kept])
        if not deviation or ranked.deviations is None:
            return list(shown)
        spread = ranked.deviations[i, kept] * (self.target.scale if self.target.kind == "rating" else 1.0)
        return [UncertainRecommendation(*r, d) for r, d in zip(shown, spread.tolist(), strict=True)]

    def expected(
        self, people: Sequence[EncodedUser], items: Sequence[Any], context: Mapping[str, Any] | None
    ) -> list[list[float]]:
        """Of each user the expected ratings, or click probabilities, of the items."""
        if not isinstance(items, Sequence | np.ndarray) or isinstance(items, str | bytes):
            raise DataError(f"items: expected a list of item ids, got {items!r}")
        rows = self.rows_of(list(items))
        rater, answers = self.needed_rater(), []
        target, limits = rater.target, rater.trained.limits
        for start in range(0, len(people), USERS):
            chunk = people[start : start + USERS]
            known = rater.batch(chunk, context)
            adapted, scores = rater.ranker.adapt(known), np.zeros((len(chunk), len(rows)), np.float32)
            for first in range(0, len(rows), CELLS // USERS):
                some = rows[first : first + CELLS // USERS]
                padded = np.zeros((len(known.items), _bucket(len(some), 16)), np.int32)
                padded[:, : len(some)] = some
                tile = np.asarray(rater.ranker.scores(adapted, known, padded))
                scores[:, first : first + len(some)] = tile[: len(chunk), : len(some)]
            values = target.decode(scores)
            answers += (np.clip(values, *limits) if target.kind == "rating" else values).tolist()
        return answers

    def needed_rater(self) -> "Predictor":
        """The predictor that knows how much an item is liked."""
        rater = self if self.target.kind != "ranking" else self.rater
        if rater is None:
            raise ValueError(
                "this recommender knows what users choose, not how much they like it: its data held one rating only, "
                "or it was trained with ratings=None; train on data with ratings of several values, "
                'mr.train(data, ratings="als")'
            )
        return rater

    def similar(self, item: Any, k: int) -> list[Recommendation]:
        """The `k` items with the largest cosine of what the network computes of each alone."""
        checked_count(k)
        (row,) = self.rows_of([item])
        likeness = self._likeness @ self._likeness[row]
        likeness[[UNKNOWN, row]] = -np.inf
        rows = np.argsort(-likeness, kind="stable")[: min(k, len(likeness) - 2)]
        return self.readable(rows, likeness[rows])

    def explain(self, person: EncodedUser, item: Any, context: Mapping[str, Any] | None) -> Explanation:
        """Why an item has its score for a user."""
        (row,) = self.rows_of([item])
        person = person._replace(**{name: getattr(person, name)[-LONGEST:] for name in ("rows", "ratings", "weights")})
        found = effects(self.ranker, self.batch([person], context), int(row))
        after, before, *without = self.target.decode(np.array([found.after, found.before, *found.without])).tolist()
        above, below = self.target.decode(found.after + np.array([1e-3, -1e-3]))
        slopes = found.slopes * (above - below) / 2e-3
        causes = []
        for i, (own, rating) in enumerate(zip(person.rows.tolist(), person.ratings.tolist(), strict=True)):
            raw, _, title = self.readable(np.array([own]), np.zeros(1))[0] if own != UNKNOWN else (None, 0, None)
            causes.append(Cause(raw, title, rating, after - without[i], float(slopes[i])))
        agreement = rank_correlation(after - np.array(without), found.slopes)
        causes.sort(key=lambda cause: -abs(cause.effect))
        fields = dict(sorted(found.fields.items(), key=lambda part: -abs(part[1])))
        ((raw, _, title),) = self.readable(np.array([row]), np.zeros(1))
        return Explanation(raw, title, after, before, causes, fields, agreement)

    def rows_of(self, items: Sequence[Any]) -> np.ndarray:
        """Rows of raw ids; a `DataError` names one that the stock does not hold."""
        rows = self.stock.encode(items)
        if (rows == UNKNOWN).any():
            raise DataError(
                f"item {items[int((rows == UNKNOWN).argmax())]!r} is unknown; name one of the stock, or add it with "
                "add_items"
            )
        return rows

    def readable(self, rows: np.ndarray, scores: np.ndarray) -> list[Recommendation]:
        """Item rows `[k]` with their scores as people read them."""
        titles = [None] * len(rows) if self.stock.titles is None else self.stock.titles[rows]
        raw = self.stock.decode(rows).tolist()
        return [Recommendation(*r) for r in zip(raw, scores.tolist(), titles, strict=True)]

    def batch(self, people: Sequence[EncodedUser], context: Mapping[str, Any] | None) -> Known:
        """The users as arrays of a few fixed shapes."""
        data, around = self.catalogue, encode_attributes(context, self.catalogue.context_fields, "context")
        longest = min(max(len(p.rows) for p in people), LONGEST)
        width, users = (
            next(b for b in buckets if b >= n) for buckets, n in ((HISTORIES, longest), (BATCHES, len(people)))
        )
        known = Known.blank(users, width, data.user_fields, data.context_fields)
        for i, person in enumerate(people):
            rows, ratings, weights = (x[-LONGEST:] for x in person[:3])
            known.items[i, : len(rows)], known.target[i, : len(rows)] = rows, self.target.grade(ratings)
            known.weight[i, : len(rows)] = weights
            for name, value in person.attributes.items():
                known.user[name][i] = value
        for name, value in around.items():
            known.context[name][:] = value
        return known

    @cached_property
    def _likeness(self) -> np.ndarray:
        """`[rows, width]` vectors of length 1, whose products say how alike items are."""
        vectors = self.ranker.vectors()
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _bucket(n: int, smallest: int, factor: int = 4) -> int:
    """The smallest of `smallest`, `smallest * factor`, ... that is at least `n`: few shapes, few compilations."""
    size = smallest
    while size < n:
        size *= factor
    return size


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-9) if len(values) else values
