"""Predictor: apply a trained model to encoded users and to all items that can be recommended."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError, IgnoredContextWarning, OptionError
from metarec_jax.inference.explain import Cause, Explanation, effects, rank_correlation
from metarec_jax.inference.histories import History, encode_attributes, encode_history
from metarec_jax.inference.ranker import BATCHES, HISTORIES, USERS, Ranked, Ranker
from metarec_jax.inference.recommendations import Choice, Recommendation, UncertainRecommendation, checked_count
from metarec_jax.inference.rerank import diversify
from metarec_jax.inference.stock import Stock
from metarec_jax.strategies.catalogue import reads_context
from metarec_jax.tasks.ranking import LONGEST, Known
from metarec_jax.training.trained import Trained

CELLS = 1 << 20  # users x items scored at once
SEEN = 1024  # rows to exclude by user that are listed; more are a mask of the stock
CANDIDATES = 100, 1000  # minimum and maximum number of candidates for re-ranking
Attributes = Mapping[str, Any] | None


class EncodedUser(NamedTuple):
    """An encoded user.

    Attributes:
      rows, ratings, weights: item rows, ratings and weights of the interactions, each `[n]`.
      attributes: encoded user attributes, each `[...]`.
      contexts: encoded contexts of the interactions, each `[n, ...]`; a missing field is unknown.
      unknown: raw ids in the history that are not in the stock.
    """

    rows: np.ndarray
    ratings: np.ndarray
    weights: np.ndarray
    attributes: dict[str, np.ndarray]
    contexts: dict[str, np.ndarray]
    unknown: Sequence[Any] = ()

    def latest(self, most: int) -> "EncodedUser":
        """Keep the latest `most` interactions."""
        contexts = {name: values[-most:] for name, values in self.contexts.items()}
        cut = {name: getattr(self, name)[-most:] for name in ("rows", "ratings", "weights")}
        return self._replace(contexts=contexts, **cut)


class Predictor:
    """Recommends, predicts and explains for `EncodedUser`s; caches what the network computes of the items alone.

    Attributes:
      trained: the model.
      stock: the items that can be recommended, including added ones.
      ranker: ranks the stock.
      rater: for a ranking, the predictor of expected ratings, or None.
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
        if ranker is not None:
            self.ranker = ranker

    @cached_property
    def ranker(self) -> Ranker:
        fields = self.catalogue.user_fields, self.catalogue.context_fields
        return Ranker(self.trained.strategy, self.trained.params, self.stock, *fields)

    def extended(self, items: Mapping[str, Sequence[Any]]) -> "Predictor":
        """Return a predictor with additional items, see `Stock.add`; existing items are not recomputed."""
        stock, rater = self.stock.add(items), self.rater and self.rater.extended(items)
        ranker = self.ranker.extended(stock) if "ranker" in self.__dict__ else None
        return Predictor(self.trained, stock, rater, ranker)

    def person(self, history: History, attributes: Attributes = None, name: str = "history") -> EncodedUser:
        """Encode one user from a history; `name` is the prefix of error messages."""
        fields = self.catalogue.context_fields
        encoded = encode_history(history, self.stock, self.trained.limits, name, [f.name for f in fields])
        contexts = [encode_attributes(context, fields, f"{name}: context") for context in encoded.contexts]
        return EncodedUser(
            encoded.rows,
            encoded.ratings,
            np.ones(len(encoded.rows), np.float32),
            self.attributes(attributes),
            {f.name: np.stack([c[f.name] for c in contexts]) for f in fields if contexts},
            encoded.unknown,
        )

    def attributes(self, given: Attributes) -> dict[str, np.ndarray]:
        """Encode the attributes of one user."""
        return encode_attributes(given, self.catalogue.user_fields)

    def top(
        self, people: Sequence[EncodedUser], k: int, context: Mapping[str, Any] | None, choice: Choice
    ) -> list[list[Any]]:
        """Return the recommendations of each user, best first."""
        if choice.by != "score" and self.target.kind == "click":
            raise OptionError(f'by={choice.by!r} needs ratings, but this recommender predicts clicks; use by="score"')
        if choice.by == "rating":
            rater = self.needed_rater()
            lists, (low, high) = rater.top(people, k, context, replace(choice, by="score")), rater.trained.limits
            return [
                [r._replace(score=min(max(r.score, low), high)) for r in recommendations] for recommendations in lists
            ]
        checked_count(k)
        self._warn_of_context(context, *([self.needed_rater()] if choice.by != "score" else []))
        allowed = self._allowed(choice, len(people))
        seeds = choice.seeds(len(people)) if choice.explore == "thompson" else np.zeros(len(people), np.uint32)
        wanted = max(k, min(max(10 * k, CANDIDATES[0]), CANDIDATES[1])) if choice.reranks else k
        lists = []
        for start in range(0, len(people), USERS):
            chunk = people[start : start + USERS]
            ranked, scores = self._ranked(chunk, start, wanted, context, choice, allowed, seeds)
            for i in range(len(chunk)):
                kept = np.flatnonzero(np.isfinite(ranked.scores[i]))[:wanted]
                kept = self._reranked(ranked.rows[i], scores[i], kept, k, choice)
                lists.append(self._shown(ranked, scores, i, kept, choice.deviation))
        return lists

    def _allowed(self, choice: Choice, users: int) -> np.ndarray | None:
        """Return masks `[1 or users, rows]` of the items each user may get; None if all may."""
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
        seeds: np.ndarray,
    ) -> tuple[Ranked, np.ndarray]:
        """Rank the stock for a chunk of users; return the candidates and the scores for re-ranking."""
        known = self.batch(chunk, context)
        users, group = len(known.items), None
        seeds = np.resize(seeds[start : start + len(chunk)], users)  # padding users draw too
        if allowed is not None and len(allowed) > 1:  # one mask per user
            allowed = allowed[start : start + len(chunk)]
        seen, allowed = self._excluded(chunk, users, choice, allowed)
        if allowed is not None and len(allowed) == len(chunk):
            group = np.arange(users, dtype=np.int32)
            allowed = np.pad(allowed, ((0, users - len(chunk)), (0, 0)))
        ranked = self.ranker.top(
            known, _bucket(wanted, 16, 8), seen=seen, allowed=allowed, group=group,
            deviation=choice.deviation, explore=choice.explore, strength=choice.strength,
            approximate=choice.approximate, seeds=seeds,
        )  # fmt: skip
        scores = np.array(self.target.decode(ranked.scores))
        if choice.by != "score":  # mix in the rating
            share, rater = float(choice.by), self.needed_rater()
            rated = rater.batch(chunk, context)
            ratings = np.asarray(rater.ranker.scores(rater.ranker.adapt(rated), rated, ranked.rows))
            for i in range(len(chunk)):
                kept = np.flatnonzero(np.isfinite(ranked.scores[i]))[:wanted]
                scores[i, kept] = (1 - share) * _standardised(scores[i, kept]) + share * _standardised(ratings[i, kept])
        return ranked, scores

    def _excluded(
        self, chunk: Sequence[EncodedUser], users: int, choice: Choice, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the rows to exclude `[users, SEEN]`, -1 for padding, and `allowed`.

        If a user has more than `SEEN` of them, all are excluded by one mask per user in `allowed` instead. Its shape is
        that of filters by user, so that long histories compile no program of their own.
        """
        blocked = self.stock.encode(list(choice.block)) if len(choice.block) else np.zeros(0, np.int32)
        own = [person.rows if choice.exclude_seen else person.rows[:0] for person in chunk]
        seen = np.full((users, SEEN), -1, np.int32)
        if len(blocked) + max(map(len, own)) <= SEEN:
            seen[:, : len(blocked)] = blocked
            for i, rows in enumerate(own):
                seen[i, len(blocked) : len(blocked) + len(rows)] = rows
            return seen, allowed
        everything = np.ones((1, len(self.stock)), bool) if allowed is None else allowed
        masks = np.repeat(everything, len(chunk) // len(everything), axis=0)
        masks[:, blocked] = False
        for mask, rows in zip(masks, own, strict=True):
            mask[rows] = False
        return seen, masks

    def _reranked(self, rows: np.ndarray, scores: np.ndarray, kept: np.ndarray, k: int, choice: Choice) -> np.ndarray:
        """Return positions of the `k` recommendations among one user's candidates `kept`."""
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
        """Return the expected ratings, or click probabilities, of the items for each user."""
        if not isinstance(items, Sequence | np.ndarray) or isinstance(items, str | bytes):
            raise DataError(f"items: expected a list of item ids, got {items!r}")
        rows = self.rows_of(list(items))
        rater, answers = self.needed_rater(), []
        rater._warn_of_context(context)
        target, limits = rater.target, rater.trained.limits
        for start in range(0, len(people), USERS):
            chunk = people[start : start + USERS]
            known = rater.batch(chunk, context)
            adapted, scores = rater.ranker.adapt(known), np.zeros((len(chunk), len(rows)), np.float32)
            for first in range(0, len(rows), CELLS // USERS):
                tile_rows = rows[first : first + CELLS // USERS]
                padded = np.zeros((len(known.items), _bucket(len(tile_rows), 16)), np.int32)
                padded[:, : len(tile_rows)] = tile_rows
                tile = np.asarray(rater.ranker.scores(adapted, known, padded))
                scores[:, first : first + len(tile_rows)] = tile[: len(chunk), : len(tile_rows)]
            values = target.decode(scores)
            answers += (np.clip(values, *limits) if target.kind == "rating" else values).tolist()
        return answers

    def needed_rater(self) -> "Predictor":
        """Return the predictor of ratings or clicks; raise `ValueError` for a ranking without one."""
        rater = self if self.target.kind != "ranking" else self.rater
        if rater is None:
            raise OptionError(
                "this recommender predicts what users choose, not how much they like it: its data had one rating "
                "value, or it was trained with ratings=None; train on data with ratings of several values, "
                'mr.train(data, ratings="als")'
            )
        return rater

    def similar(self, item: Any, k: int) -> list[Recommendation]:
        """Return the `k` items with the largest cosine similarity of item vectors (`Ranker.vectors`)."""
        checked_count(k)
        (row,) = self.rows_of([item])
        likeness = self._likeness @ self._likeness[row]
        likeness[[UNKNOWN, row]] = -np.inf
        rows = np.argsort(-likeness, kind="stable")[: min(k, len(likeness) - 2)]
        return self.readable(rows, likeness[rows])

    def explain(self, person: EncodedUser, item: Any, context: Mapping[str, Any] | None) -> Explanation:
        """Explain an item's score for a user."""
        (row,) = self.rows_of([item])
        self._warn_of_context(context)
        person = person.latest(LONGEST)
        raw_scores = effects(self.ranker, self.batch([person], context), int(row))
        after, before, *without = self.target.decode(
            np.array([raw_scores.after, raw_scores.before, *raw_scores.without])
        ).tolist()
        above, below = self.target.decode(raw_scores.after + np.array([1e-3, -1e-3]))
        slopes = raw_scores.slopes * (above - below) / 2e-3
        causes = []
        for i, (own_row, rating) in enumerate(zip(person.rows.tolist(), person.ratings.tolist(), strict=True)):
            raw, _, title = (
                self.readable(np.array([own_row]), np.zeros(1))[0] if own_row != UNKNOWN else (None, 0, None)
            )
            causes.append(Cause(raw, title, rating, after - without[i], float(slopes[i])))
        agreement = rank_correlation(after - np.array(without), raw_scores.slopes)
        causes.sort(key=lambda cause: -abs(cause.effect))
        fields = dict(sorted(raw_scores.fields.items(), key=lambda part: -abs(part[1])))
        ((raw, _, title),) = self.readable(np.array([row]), np.zeros(1))
        return Explanation(raw, title, after, before, causes, fields, agreement)

    def rows_of(self, items: Sequence[Any]) -> np.ndarray:
        """Return rows of raw ids; raise `DataError` for an id that is not in the stock."""
        rows = self.stock.encode(items)
        if (rows == UNKNOWN).any():
            raise DataError(
                f"item {items[int((rows == UNKNOWN).argmax())]!r} is unknown; use an item of the stock, or add it with "
                "add_items"
            )
        return rows

    def readable(self, rows: np.ndarray, scores: np.ndarray) -> list[Recommendation]:
        """Return item rows `[k]` and scores as `Recommendation`s."""
        titles = [None] * len(rows) if self.stock.titles is None else self.stock.titles[rows]
        raw = self.stock.decode(rows).tolist()
        return [Recommendation(*r) for r in zip(raw, scores.tolist(), titles, strict=True)]

    def batch(self, people: Sequence[EncodedUser], context: Mapping[str, Any] | None) -> Known:
        """Pack users into arrays, padded to one of a few fixed shapes."""
        data, encoded_context = self.catalogue, encode_attributes(context, self.catalogue.context_fields, "context")
        longest = min(max(len(p.rows) for p in people), LONGEST)
        width, users = (
            next(b for b in buckets if b >= n) for buckets, n in ((HISTORIES, longest), (BATCHES, len(people)))
        )
        known = Known.blank(users, width, data.user_fields, data.context_fields)
        past = known.past or {}
        for i, person in enumerate(people):
            person = person.latest(LONGEST)
            count = len(person.rows)
            known.items[i, :count], known.target[i, :count] = person.rows, self.target.grade(person.ratings)
            known.weight[i, :count] = person.weights
            for name, value in person.attributes.items():
                known.user[name][i] = value
            for name, values in person.contexts.items():
                past[name][i, :count] = values
        for name, value in encoded_context.items():
            known.context[name][:] = value
        return known

    @cached_property
    def reads_context(self) -> bool:
        """Whether scores depend on the context of a call."""
        known, ranker = Known.blank(1, HISTORIES[0], *self.ranker.fields), self.ranker
        return bool(known.context) and reads_context(ranker.strategy, ranker.params, ranker.tables, known)

    def _warn_of_context(self, context: Mapping[str, Any] | None, *others: "Predictor") -> None:
        """Warn of a valid context that neither this predictor nor one of `others` reads."""
        fields = {f.name for f in self.catalogue.context_fields}
        if not isinstance(context, Mapping) or not context or not fields.issuperset(context):
            return
        if not any(predictor.reads_context for predictor in (self, *others)):
            warnings.warn(
                f"the strategy {self.trained.name or 'of this model'} ignores the context {dict(context)}: stack, "
                "ials, ease, item_knn, content, transitions and als read no contexts; softmax_ridge and strategies "
                "with a network, such as alpaca or prototypes, do",
                IgnoredContextWarning,
                stacklevel=_outside(),
            )

    @cached_property
    def _likeness(self) -> np.ndarray:
        """Unit item vectors `[rows, width]`, whose products are cosine similarities."""
        vectors = self.ranker.vectors()
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _outside() -> int:
    """Return the `stacklevel` that names the first caller outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("metarec_jax"):
        frame, level = frame.f_back, level + 1
    return level


def _bucket(n: int, smallest: int, factor: int = 4) -> int:
    """Return the smallest of `smallest`, `smallest * factor`, ... that is at least `n`, to limit compilations."""
    size = smallest
    while size < n:
        size *= factor
    return size


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-9) if len(values) else values
