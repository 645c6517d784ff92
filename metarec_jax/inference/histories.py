"""Histories: validate the histories and attributes that callers pass, and encode them as arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from metarec_jax.data.fields import Field, as_objects
from metarec_jax.data.tables import to_polars
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError

ItemId = int | str
History = Mapping[Any, float] | Sequence[tuple[Any, float]] | Sequence[ItemId]
FORMS = "{item: rating, ...}, [(item, rating), ...] or [item, ...], or a table with item_id"


class Rows(Protocol):
    """Encoder of raw item ids as rows: a `Vocabulary` or a `Stock`."""

    def encode(self, values: Any) -> np.ndarray:
        """Return rows `[n]` of raw ids; 0 where unknown."""


def is_one_user(history: Any) -> bool:
    """Return whether this is the history of one user, not a batch of histories.

    One user's history is a mapping, a table, an empty sequence, item ids, or (item, rating) tuples. A batch is a
    sequence of histories. Its entries must not be tuples of length two, which are read as (item, rating) pairs.

    Raises:
      DataError: neither a mapping nor a sequence.
    """
    if isinstance(history, Mapping) or _is_table(history):
        return True
    entries = _sequence(history)
    if entries is None:
        raise DataError(f"history: expected {FORMS}, or a list of such; got {_shown(history)}")
    return not entries or _is_id(entries[0]) or _is_pair(entries[0])


def encode_history(
    history: History, items: Rows, limits: tuple[float, float], who: str
) -> tuple[np.ndarray, np.ndarray]:
    """Encode one user's history as item rows `[n]` and ratings `[n]`.

    A repeated item counts once, with its last rating. An unknown item is encoded as the unknown row: it still shows how
    high the user rates.

    Args:
      history: `{item: rating}`, `[(item, rating), ...]`, or item ids alone, `[item, ...]`, which are positives with the
        rating `limits[1]`. Also an array or a column of ids, or a pandas, polars or Arrow table with the column item_id
        and optionally rating.
      items: encoder of raw ids as rows.
      limits: lowest and highest rating of the training.
      who: prefix of error messages.

    Raises:
      DataError: another form, or ids mixed with pairs; an id of another type than in training; a rating that is not
        finite or off the scale.
    """
    entries = list(history.items()) if isinstance(history, Mapping) else _sequence(history)
    if entries is None:
        raise DataError(f"{who}: expected {FORMS}, got {_shown(history)}")
    if not entries:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    is_ids = [_is_id(entry) for entry in entries]
    is_pairs = [isinstance(entry, list | tuple) and len(entry) == 2 for entry in entries]
    if bad := [entry for entry, is_id, pair in zip(entries, is_ids, is_pairs, strict=True) if not (is_id or pair)]:
        raise DataError(f"{who}: every entry must be (item, rating), or every entry an item id; got {_shown(bad[0])}")
    if any(is_ids) and any(is_pairs):
        raise DataError(
            f"{who}: item id {entries[is_ids.index(True)]!r} and pair {entries[is_pairs.index(True)]!r} are mixed; "
            "give item ids alone (positives), or (item, rating) for each"
        )
    if all(is_ids):
        rows, ratings = items.encode(as_objects(entries)), np.full(len(entries), limits[1], np.float32)
    else:
        rows = items.encode(as_objects([item for item, _ in entries]))
        ratings = np.zeros(len(entries), np.float32)
        for i, (item, rating) in enumerate(entries):
            ratings[i] = checked_rating(rating, limits, f"{who}: the rating of item {item!r}")
    latest = {row if row != UNKNOWN else (UNKNOWN, i): i for i, row in enumerate(rows.tolist())}
    keep = np.array(sorted(latest.values()))
    return rows[keep], ratings[keep]


def _sequence(history: Any) -> list[Any] | None:
    """Return the entries of a sequence, an array or column of ids, or a table; None for other types."""
    if isinstance(history, np.ndarray) and history.ndim == 1:
        return history.tolist()
    if _is_table(history):
        table = to_polars(history, "history")
        if "item_id" not in table.columns:
            raise DataError(f"history: a table needs the column item_id; it has {', '.join(table.columns)}")
        items = table["item_id"].to_list()
        return list(zip(items, table["rating"].to_list(), strict=True)) if "rating" in table.columns else items
    if hasattr(history, "to_list"):  # a pandas or polars column
        return history.to_list()
    if isinstance(history, str | bytes) or not isinstance(history, Sequence):
        return None
    return list(history)


def _is_table(history: Any) -> bool:
    """Return whether this is a pandas, polars or Arrow table."""
    return hasattr(type(history), "columns")


def _is_id(entry: Any) -> bool:
    return isinstance(entry, int | str | np.integer) and not isinstance(entry, bool)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and not isinstance(entry[0], Mapping | list | tuple)


def _shown(value: Any) -> str:
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
    """Encode the attributes of one user, or one context, each `[...]`; omitted fields are unknown."""
    attributes = dict(attributes or {})
    if unknown := set(attributes) - {f.name for f in fields}:
        raise DataError(
            f"{what} {sorted(unknown)[0]!r} is unknown to the model; it knows: "
            f"{', '.join(f.name for f in fields) or 'none'}"
        )
    return {f.name: f.encode([attributes[f.name]])[0] if f.name in attributes else f.unknown() for f in fields}
