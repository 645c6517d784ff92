"""New users at the boundary: what callers pass as a history, checked and encoded to task arrays."""

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
    """What gives raw item ids rows: a `Vocabulary` or a `Stock`."""

    def encode(self, values: Any) -> np.ndarray:
        """Rows `[n]` of raw ids, 0 where unknown."""


def is_one_user(history: Any) -> bool:
    """Whether this is one user's history: a mapping, a table, an empty sequence, item ids, or (item, rating) tuples.

    A batch is a sequence of histories. Its entries must not be tuples of two, which are (item, rating) pairs.

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
    """Item rows `[n]` and ratings `[n]` of one user.

    An item that comes twice counts once, with the later rating. An unknown item becomes the unknown row: it still tells
    how high the user rates.

    Args:
      history: `{item: rating}`, `[(item, rating), ...]`, or item ids alone, `[item, ...]`, which are positives: their
        rating is `limits[1]`; also an array or a column of ids, or a pandas, polars or Arrow table with the column
        item_id and, where there is one, rating.
      items: rows of raw ids.
      limits: lowest and highest rating of the training.
      who: begins the message of an error.

    Raises:
      DataError: another form, or ids mixed with pairs; an id of another type than in training; a rating that is not
        finite or off the scale.
    """
    entries = list(history.items()) if isinstance(history, Mapping) else _sequence(history)
    if entries is None:
        raise DataError(f"{who}: expected {FORMS}, got {_shown(history)}")
    if not entries:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    alone = [_is_id(entry) for entry in entries]
    pairs = [isinstance(entry, list | tuple) and len(entry) == 2 for entry in entries]
    if bad := [entry for entry, one, pair in zip(entries, alone, pairs, strict=True) if not (one or pair)]:
        raise DataError(f"{who}: every entry must be (item, rating), or every entry an item id; got {_shown(bad[0])}")
    if any(alone) and any(pairs):
        raise DataError(
            f"{who}: item id {entries[alone.index(True)]!r} and pair {entries[pairs.index(True)]!r} are mixed; give "
            "item ids alone (positives), or (item, rating) for each"
        )
    if all(alone):
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
    """The entries of a sequence, an array or a column of ids, or a table; None where it is neither."""
    if isinstance(history, np.ndarray) and history.ndim == 1:
        return history.tolist()
    if _is_table(history):
        table = to_polars(history, "history")
        if "item_id" not in table.columns:
            raise DataError(f"history: a table needs the column item_id; it has {', '.join(table.columns)}")
        items = table["item_id"].to_list()
        return list(zip(items, table["rating"].to_list(), strict=True)) if "rating" in table.columns else items
    if hasattr(history, "to_list"):  # a column of theirs
        return history.to_list()
    if isinstance(history, str | bytes) or not isinstance(history, Sequence):
        return None
    return list(history)


def _is_table(history: Any) -> bool:
    """Whether it is a pandas, polars or Arrow table."""
    return hasattr(type(history), "columns")


def _is_id(entry: Any) -> bool:
    return isinstance(entry, int | str | np.integer) and not isinstance(entry, bool)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and not isinstance(entry[0], Mapping | list | tuple)


def _shown(value: Any) -> str:
    """What an error says was given."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no boolean."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and bool(np.isfinite(value))


def checked_rating(rating: Any, limits: tuple[float, float], what: str) -> float:
    """A finite number that is, to catch another scale, no further outside the training range `limits` than half its
    width; `what` begins the message of the `DataError`."""
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
    """Encoded attributes of one user, or one context, each `[...]`; a field that is not given is unknown."""
    attributes = dict(attributes or {})
    if unknown := set(attributes) - {f.name for f in fields}:
        raise DataError(
            f"{what} {sorted(unknown)[0]!r} is unknown to the model; it knows: "
            f"{', '.join(f.name for f in fields) or 'none'}"
        )
    return {f.name: f.encode([attributes[f.name]])[0] if f.name in attributes else f.unknown() for f in fields}
