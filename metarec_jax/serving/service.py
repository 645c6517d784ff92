"""Service: a recommender whose model can be replaced while it answers; independent of HTTP."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metarec_jax.api import load
from metarec_jax.errors import DataError, ModelFileError
from metarec_jax.inference.recommendations import Choice
from metarec_jax.inference.stock import Stock
from metarec_jax.recommender import Recommender
from metarec_jax.serving.categories import Categories
from metarec_jax.serving.warming import VARIED, warm
from metarec_jax.state.events import Store
from metarec_jax.state.stores import open_store

MOST = 1000  # maximum number of recommendations or ids per request
TRIES = 5  # attempts to read a model that is being replaced


class Service:
    """The operations behind the endpoints.

    Args:
      model: folder of a saved model.
      users, half_life: see `Recommender.with_users`.
      report: called with log lines.

    Raises:
      ModelFileError, StoreError: the model or the store cannot be opened.
    """

    def __init__(
        self,
        model: str | Path,
        users: str | Path | Store = ":memory:",
        *,
        half_life: float | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path, self.half_life, self.report = Path(model), half_life, report
        self.users = open_store(users)
        self.current = self._load()
        self._named: tuple[Stock | None, list[str]] = (None, [])  # search text of each row
        self._grouped: tuple[Stock, Categories] | None = None
        self.ready, self._reloading = False, threading.Lock()

    def warm(self) -> None:
        """Compile the programs that requests need; requests are answered meanwhile too."""
        self._warm(self.current)
        self.ready = True

    def reload(self) -> str:
        """Reload the model folder and return the version in use.

        Requests get the old model until the new one is compiled.

        Raises:
          ModelFileError: no complete model; the old one stays in use.
        """
        with self._reloading:
            new = self._load()
            if new.version != self.current.version:
                self._warm(new)
                self.current = new
                self.report(f"model {new.version} is in use")
            return str(self.current.version)

    def recommend(self, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the answer or the exception of each request; requests with equal options form a batch."""
        current = self.current
        answers: list[Any] = [None] * len(requests)
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            options = {name: request[name] for name in OPTIONS if name in request and name != "seed"}
            groups.setdefault(("user" in request, repr(sorted(options.items()))), []).append(i)
        for (known, _), members in groups.items():
            results: list[Any]
            try:
                results = self._recommend(current, [requests[i] for i in members], known)
            except ValueError as error:  # answer each alone, so that only the bad one fails
                results = [error] if len(members) == 1 else [self.recommend([requests[i]])[0] for i in members]
            for i, answer in zip(members, results, strict=True):
                answers[i] = answer
        return answers

    def _recommend(self, current: Recommender, requests: Sequence[Mapping[str, Any]], known: bool) -> list[Any]:
        options = {name: _typed(name, requests[0][name]) for name in OPTIONS if name in requests[0]}
        seeds = [request.get("seed") for request in requests]
        options["seed"] = [None if seed is None else _typed("seed", seed) for seed in seeds]
        sizes = [_count(request.get("k", 10)) for request in requests]
        wheres: Any = [_where(request.get("where")) for request in requests]
        options["where"] = wheres if any(wheres) or "only" in options else None  # one mask per user, or none
        context = options.pop("context", None)
        if known:
            people = current.batch.remembered([request["user"] for request in requests])
        else:
            each = [(self._history(request.get("history", [])), _attributes(request)) for request in requests]
            people = [current.predictor.person(history, attributes) for history, attributes in each]
        lists = current.predictor.top(people, max(sizes), context, Choice(**options))
        return [
            {"items": [item._asdict() for item in recommendations[:k]], "model": current.version}
            | ({"unknown": list(person.unknown)} if person.unknown else {})
            for recommendations, k, person in zip(lists, sizes, people, strict=True)
        ]

    def update(self, requests: Sequence[Sequence[Mapping[str, Any]]]) -> list[Any]:
        """Store events; return the number of new events, or the exception, of each request.

        All valid requests are stored in one transaction.
        """
        recommender = self.current
        checked: list[Any] = []
        for events in requests:
            try:
                checked.append(recommender.checked(events))
            except DataError as error:
                checked.append(error)
        good = [events for events in checked if not isinstance(events, Exception)]
        counts = iter(self.users.append(*good) if good else [])
        return [events if isinstance(events, Exception) else {"new": next(counts)} for events in checked]

    def explain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Explain an item's score; see `Recommender.explain`."""
        current = self.current
        if "item" not in request:
            raise DataError("explain: an item is missing")
        known = "user" in request
        who = request["user"] if known else self._history(request.get("history", []))
        if known and not isinstance(who, int | str):
            raise DataError(f"user: an id is an integer or a string, got {who!r}")
        options = {
            "user": None if known else _attributes(request),
            "context": _typed("context", request.get("context", {})),
        }
        return current.explain(who, request["item"], **options).as_dict() | {"model": current.version}

    def describe(self) -> dict[str, Any]:
        """Describe the model in use: version, number of items, target, and lowest and highest rating.

        `predicts` is "ranking" (scores compare items for one user), "click" (scores are probabilities) or "rating".
        """
        current = self.current
        return {
            "model": current.version,
            "items": len(current.stock) - 1,
            "predicts": current.target.kind,
            "ratings": list(current.limits),
        }

    def start(self, k: Any = 12) -> dict[str, Any]:
        """Return diversified recommendations for a cold-start user without history."""
        current = self.current
        recommended = current.recommend([], _count(k), diversity=VARIED)
        rows = current.stock.encode([item.item for item in recommended]).tolist()
        scores = [{"score": item.score} for item in recommended]
        items = [item | score for item, score in zip(self._shown(current.stock, rows), scores, strict=True)]
        return {"items": items, "model": current.version}

    def fields(self) -> dict[str, Any]:
        """Return the fields that group items, with their most frequent values; see `Categories.fields`."""
        current = self.current
        return {"fields": self._categories(current.stock).fields(), "model": current.version}

    def find(self, text: str, most: int = 20) -> list[dict[str, Any]]:
        """Return up to `most` items whose title or id contains the text, ignoring case."""
        stock = self.current.stock
        rows = [row for row, name in enumerate(self._names(stock)) if row and text.casefold() in name][:most]
        return self._shown(stock, rows)

    def items(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return the items of these ids, given as strings, in order.

        Raises:
          DataError: an unknown id; an id that is not an integer where ids are integers; too many ids.
        """
        if len(ids) > MOST:
            raise DataError(f"id: got {len(ids)} ids; ask for at most {MOST} at once")
        current, raw = self.current, list[Any](ids)
        if current.stock.trained.ids.dtype.kind == "i":
            try:
                raw = [int(text) for text in ids]
            except ValueError as error:
                raise DataError(f"id: ids of this model are integers ({error})") from error
        return self._shown(current.stock, current.predictor.rows_of(raw).tolist())

    def _shown(self, stock: Stock, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return items for display: id, title and, as `about`, categories by field."""
        raw = stock.decode(rows).tolist() if rows else []
        titles = [None] * len(rows) if stock.titles is None else [stock.titles[row] for row in rows]
        categories = self._categories(stock)
        return [
            {"item": item, "title": title, "about": categories.of(row)}
            for item, title, row in zip(raw, titles, rows, strict=True)
        ]

    def _categories(self, stock: Stock) -> Categories:
        grouped = self._grouped
        if grouped is None or grouped[0] is not stock:
            self._grouped = grouped = (stock, Categories(stock))
        return grouped[1]

    def _names(self, stock: Stock) -> list[str]:
        named, names = self._named
        if named is not stock:
            ids = ["", *map(str, stock.decode(range(1, len(stock))).tolist())]
            titles = [None] * len(stock) if stock.titles is None else stock.titles
            names = [f"{t or ''} {i}".casefold() for t, i in zip(titles, ids, strict=True)]
            self._named = (stock, names)
        return names

    def _history(self, history: Any) -> Any:
        """Convert a JSON history; keys of JSON objects are strings, even where ids are integers."""
        if isinstance(history, Mapping):
            if self.current.stock.trained.ids.dtype.kind == "i":
                try:
                    return {int(item): rating for item, rating in history.items()}
                except ValueError as error:
                    raise DataError(f"history: ids of this model are integers ({error})") from error
            return history
        if not isinstance(history, list):
            raise DataError(f"history: expected a list of [item, rating] or a list of items, got {history!r}")
        return [tuple(pair) if isinstance(pair, list) else pair for pair in history]

    def _load(self) -> Recommender:
        for _ in range(TRIES - 1):
            try:
                return load(self.path, users=self.users, half_life=self.half_life)
            except ModelFileError:
                time.sleep(0.2)  # it may be being replaced
        return load(self.path, users=self.users, half_life=self.half_life)

    def _warm(self, recommender: Recommender) -> None:
        start = time.perf_counter()
        warm(recommender)
        self.report(f"ready after {time.perf_counter() - start:.0f} s of compilation")


OPTIONS: dict[str, tuple[tuple[type, ...], str]] = {  # of `Recommender.recommend`, shared by a batch
    "context": ((dict,), "an object"),
    "exclude_seen": ((bool,), "true or false"),
    "only": ((list,), "a list of items"),
    "block": ((list,), "a list of items"),
    "diversity": ((int, float), "a number from 0 to 1"),
    "explore": ((str,), '"ucb" or "thompson"'),
    "strength": ((int, float), "a number"),
    "seed": ((int,), "an integer of 32 bits"),
    "deviation": ((bool,), "true or false"),
    "by": ((str, int, float), '"score", "rating" or a number from 0 to 1'),
}


def _typed(name: str, value: Any) -> Any:
    types, expected = OPTIONS[name]
    overflows = isinstance(value, int) and not -(2**31) <= value < 2**31  # JAX integers have 32 bits
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or overflows:
        raise DataError(f"{name}: expected {expected}, got {value!r}")
    return value


def _count(k: Any) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST:
        raise DataError(f"k must be an integer from 1 to {MOST}, got {k!r}")
    return k


def _attributes(request: Mapping[str, Any]) -> Any:
    attributes = request.get("attributes")
    if attributes is not None and not isinstance(attributes, Mapping):
        raise DataError(f"attributes: expected an object, got {attributes!r}")
    return attributes


def _where(where: Any) -> Any:
    """Convert filters of JSON, where bounds are `{"from": 10, "to": 20}`."""
    if where is None:
        return None
    if not isinstance(where, Mapping):
        raise DataError(f"where: expected an object by field, got {where!r}")
    return {
        name: (condition.get("from"), condition.get("to")) if isinstance(condition, Mapping) else condition
        for name, condition in where.items()
    }
