"""New users at the boundary: what callers pass as a history, checked and encoded to task arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from metarec_jax.data.fields import Field, as_objects
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.errors import DataError

History = Mapping[Any, float] | Sequence[tuple[Any, float]]


class Rows(Protocol):
    """What gives raw item ids rows: a `Vocabulary` or a `Stock`."""

    def encode(self, values: Any) -> np.ndarray:
        """Rows `[n]` of raw ids, 0 where unknown."""


def is_one_user(history: Any) -> bool:
    """Whether this is one user's history, no batch: a mapping, an empty sequence, or (item, rating) pairs."""
    if isinstance(history, Mapping):
        return True
    if isinstance(history, str | bytes) or not isinstance(history, Sequence):
        raise DataError(
            "history: expected {item: rating, ...}, [(item, rating), ...], or a list of such; "
            f"got {type(history).__name__}"
        )
    first = history[0] if len(history) else None
    return first is None or (isinstance(first, tuple) and len(first) == 2 and not isinstance(first[0], Mapping | tuple))


def encode_history(
    history: History, items: Rows, limits: tuple[float, float], who: str
) -> tuple[np.ndarray, np.ndarray]:
    """Item rows `[n]` and ratings `[n]` of one user.

    An item rated twice counts once, with the later rating. An unknown item becomes the unknown row: it still
    tells how high the user rates.
    """
    if not isinstance(history, Mapping | Sequence) or isinstance(history, str | bytes):
        raise DataError(f"{who}: expected {{item: rating}} or [(item, rating), ...], got {history!r}")
    pairs = list(history.items()) if isinstance(history, Mapping) else list(history)
    if bad := [p for p in pairs if isinstance(p, str | bytes) or not isinstance(p, Sequence) or len(p) != 2]:
        raise DataError(f"{who}: every entry must be (item, rating), got {bad[0]!r}")
    if not pairs:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    rows = items.encode(as_objects([item for item, _ in pairs]))
    ratings = np.zeros(len(pairs), np.float32)
    for i, (item, rating) in enumerate(pairs):
        ratings[i] = checked_rating(rating, limits, f"{who}: the rating of item {item!r}")
    latest = {row if row != UNKNOWN else (UNKNOWN, i): i for i, row in enumerate(rows.tolist())}
    keep = np.array(sorted(latest.values()))
    return rows[keep], ratings[keep]


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
