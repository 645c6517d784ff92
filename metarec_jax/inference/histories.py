"""Histories: validate the histories and attributes that callers pass, and encode them as arrays."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from metarec_jax.data.fields import Field, as_objects
from metarec_jax.data.tables import to_polars
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError

ItemId = int | str
History = (
    Mapping[Any, float]
    | Sequence[tuple[Any, float]]
    | Sequence[tuple[Any, float, Mapping[str, Any]]]
    | Sequence[ItemId]
)
FORMS = "{item: rating, ...}, [(item, rating), ...] or [item, ...], or a table with item_id"
POSITIVE = None  # the rating of an entry that is an item id alone


class Rows(Protocol):
    """Encoder of raw item ids as rows: a `Vocabulary` or a `Stock`."""

    def encode(self, values: Any) -> np.ndarray:
        """Return rows `[n]` of raw ids; 0 where unknown."""


class Entry(NamedTuple):
    """An interaction of a history: raw item id, rating (`POSITIVE`: the highest) and context."""

    item: Any
    rating: Any
    context: Mapping[str, Any] = MappingProxyType({})


class EncodedHistory(NamedTuple):
    """One user's history: item rows `[n]`, ratings `[n]`, the contexts of the n interactions, and unknown raw ids."""

    rows: np.ndarray
    ratings: np.ndarray
    contexts: list[Mapping[str, Any]]
    unknown: list[Any]


def encode_history(
    history: History, items: Rows, limits: tuple[float, float], who: str, contexts: Sequence[str] = ()
) -> EncodedHistory:
    """Encode one user's history.

    A repeated item counts once, with its last rating. An unknown item is encoded as the unknown row: it still shows how
    high the user rates.

    Args:
      history: `{item: rating}`, `[(item, rating), ...]`, `[(item, rating, context), ...]`, or item ids alone,
        `[item, ...]`, which are positives with the rating `limits[1]`. Also an array or a column of ids, or a pandas,
        polars or Arrow table of one user with the column item_id and optionally rating, timestamp (rows are then
        sorted by it) and contexts.
      items: encoder of raw ids as rows.
      limits: lowest and highest rating of the training.
      who: prefix of error messages.
      contexts: names of the context fields, read from the columns of a table.

    Raises:
      DataError: another form, or ids mixed with pairs; several histories; an id of another type than in training; a
        rating that is not finite or off the scale.
    """
    entries = _entries(history, who, contexts)
    rows = items.encode(as_objects([entry.item for entry in entries])) if entries else np.zeros(0, np.int32)
    ratings = np.full(len(entries), limits[1], np.float32)
    for i, (item, rating, _) in enumerate(entries):
        if rating is not POSITIVE:
            ratings[i] = checked_rating(rating, limits, f"{who}: the rating of item {item!r}")
    latest = {row if row != UNKNOWN else (UNKNOWN, i): i for i, row in enumerate(rows.tolist())}
    keep = sorted(latest.values())
    unknown = [entries[i].item for i in keep if rows[i] == UNKNOWN]
    return EncodedHistory(rows[keep], ratings[keep], [entries[i].context for i in keep], unknown)


def _entries(history: Any, who: str, contexts: Sequence[str]) -> list[Entry]:
    """Read a history of any form; see `encode_history`."""
    if isinstance(history, Mapping):
        return [_rated(item, rating, who) for item, rating in history.items()]
    if is_table(history):
        return _of_table(history, who, contexts)
    if isinstance(history, np.ndarray) and history.ndim == 1:
        history = history.tolist()
    elif hasattr(history, "to_list"):  # a pandas or polars column
        history = history.to_list()
    if isinstance(history, str | bytes) or not isinstance(history, Sequence):
        raise DataError(f"{who}: expected {FORMS}, got {shown(history)}")
    entries = [_entry(entry, who) for entry in history]
    by_form = {entry.rating is POSITIVE: raw for entry, raw in zip(entries, history, strict=True)}
    if len(by_form) > 1:
        raise DataError(
            f"{who}: item id {by_form[True]!r} and pair {by_form[False]!r} are mixed; give item ids alone (positives), "
            "or (item, rating) for each"
        )
    return entries


def _entry(entry: Any, who: str) -> Entry:
    """Read an item id, a pair (item, rating) or a triple (item, rating, context).

    A list is never a pair: a list of lists of two numbers may also be the item ids of several users.
    """
    if isinstance(entry, int | str | np.integer) and not isinstance(entry, bool):
        return Entry(entry, POSITIVE)
    if isinstance(entry, tuple) and len(entry) == 2:
        return _rated(*entry, who)
    if isinstance(entry, tuple) and len(entry) == 3 and (entry[2] is None or isinstance(entry[2], Mapping)):
        return _rated(*entry[:2], who)._replace(context=entry[2] or {})
    several = isinstance(entry, Mapping | list | np.ndarray) or is_table(entry)
    raise DataError(
        f"{who}: every entry must be (item, rating) or (item, rating, context), or every entry an item id; got "
        + shown(entry)
        + ("; a pair is a tuple; for several users call recommender.batch with a list of histories" if several else "")
    )


def _rated(item: Any, rating: Any, who: str) -> Entry:
    if rating is POSITIVE:
        raise DataError(f"{who}: the rating of item {item!r} is {rating!r}; it must be a finite number")
    return Entry(item, rating)


def _of_table(history: Any, who: str, contexts: Sequence[str]) -> list[Entry]:
    table = to_polars(history, "history")
    if "item_id" not in table.columns:
        raise DataError(f"{who}: a table needs the column item_id; it has {', '.join(table.columns)}")
    if "user_id" in table.columns and table["user_id"].n_unique() > 1:
        raise DataError(
            f"{who}: the table holds {table['user_id'].n_unique()} users; give the rows of one, or the ids of known "
            "users to recommender.batch.recommend_to"
        )
    if "timestamp" in table.columns:
        table = table.sort("timestamp", maintain_order=True)
    items, count = table["item_id"].to_list(), len(table)
    known = [name for name in contexts if name in table.columns]
    rows = table.select(known).to_dicts() if known else [{}] * count
    if "rating" not in table.columns:
        return [_entry(item, who)._replace(context=context) for item, context in zip(items, rows, strict=True)]
    rated = zip(items, table["rating"].to_list(), rows, strict=True)
    return [_rated(item, rating, who)._replace(context=context) for item, rating, context in rated]


def is_table(history: Any) -> bool:
    """Return whether this is a pandas, polars or Arrow table."""
    return hasattr(type(history), "columns")


def shown(value: Any) -> str:
    """Return a short representation of a value for error messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_number(value: Any) -> bool:
    """Return whether this is a finite number, and not a boolean."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and bool(np.isfinite(value))


def checked_rating(rating: Any, limits: tuple[float, float], what: str) -> float:
    """Validate a rating: a finite number within `limits`, extended by half their width on both sides.

    Ratings further outside are taken to be on another scale. `what` is the prefix of the `DataError`.
    """
    slack = (limits[1] - limits[0]) / 2
    if not is_number(rating):
        raise DataError(f"{what} is {rating!r}; it must be a finite number")
    if not limits[0] - slack <= rating <= limits[1] + slack:
        raise DataError(
            f"{what} is {rating!r}, off the scale that the model was trained on ({limits[0]:g} to {limits[1]:g}); "
            "convert it to that scale"
        )
    return float(rating)


def encode_attributes(
    attributes: Mapping[str, Any] | None, fields: tuple[Field, ...], what: str = "user attribute"
) -> dict[str, np.ndarray]:
    """Encode the attributes of one user, or one context, each `[...]`; omitted fields and new values are unknown."""
    if attributes is not None and not isinstance(attributes, Mapping):
        raise DataError(
            f"{what}: expected a mapping, {{field: value}}, got {shown(attributes)}; for several users call "
            "recommender.batch"
        )
    attributes = dict(attributes or {})
    if unknown := set(attributes) - {f.name for f in fields}:
        raise DataError(
            f"{what} {sorted(unknown)[0]!r} is unknown to the model; it knows: "
            f"{', '.join(f.name for f in fields) or 'none'}"
        )
    return {f.name: f.encode([attributes[f.name]])[0] if f.name in attributes else f.unknown() for f in fields}
