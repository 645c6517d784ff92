"""Feedback: validation of user events and their conversion to ratings and weights."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from metarec_jax.data.fields import Field
from metarec_jax.data.vocabulary import is_missing
from metarec_jax.errors import DataError
from metarec_jax.inference.histories import checked_rating, is_number, shown
from metarec_jax.state.events import Event, Stored

KINDS = ("rating", "click", "purchase", "dismiss", "remove")
AHEAD = 300.0  # tolerated clock skew of senders, in seconds


def worth(kind: str, value: float | None, limits: tuple[float, float], threshold: float) -> float:
    """Return the rating that an event stands for.

    A click counts as the lowest rating that is a click (`threshold`), a purchase as the highest rating, a dismissal as
    the lowest.
    """
    if kind == "rating":
        assert value is not None
        return value
    low, high = limits
    return {"click": min(max(threshold, low), high), "purchase": high, "dismiss": low}[kind]


def checked(
    events: Iterable[Event | Mapping[str, Any]], kind: type, limits: tuple[float, float], fields: Sequence[Field] = ()
) -> list[Event]:
    """Validate events and return them as `Event`s.

    Args:
      events: `Event`s, or mappings with the same keys.
      kind: type of item ids, `int` or `str`.
      limits: lowest and highest rating of the training.
      fields: context fields of the model.

    Raises:
      DataError: an invalid event; the message tells its position and what is expected.
    """
    valid, latest = [], time.time() + AHEAD
    for position, raw in enumerate(events):
        where = f"event {position}"
        try:
            event = raw if isinstance(raw, Event) else Event(**raw)
        except TypeError as error:
            raise DataError(
                f"{where}: expected an Event or a mapping with {', '.join(Event._fields)}; got {raw!r}"
            ) from error
        user = checked_id(event.user, None, f"{where}: user")
        item = checked_id(event.item, kind, f"{where}: item")
        if event.kind not in KINDS:
            raise DataError(f"{where}: kind must be one of {', '.join(KINDS)}, got {event.kind!r}")
        if (event.value is None) == (event.kind == "rating"):
            raise DataError(f"{where}: a rating has a value, nothing else has; got {event.kind} {event.value!r}")
        if event.kind == "rating":
            checked_rating(event.value, limits, f"{where}: the rating")
        if event.time is not None and not (is_number(event.time) and event.time >= 0):
            raise DataError(f"{where}: time must be seconds since 1970, got {event.time!r}")
        if event.time is not None and event.time > latest:
            raise DataError(
                f"{where}: its time {event.time:.0f} is {event.time - latest + AHEAD:.0f} s in the future; send "
                "seconds, not milliseconds, and check the clock"
            )
        if event.id is not None and not (isinstance(event.id, str) and 0 < len(event.id) <= 256):
            raise DataError(f"{where}: id must be a string of 1 to 256 characters, got {event.id!r}")
        value = None if event.value is None else float(event.value)
        at = None if event.time is None else float(event.time)
        context = checked_context(event.context, fields, where)
        valid.append(event._replace(user=user, item=item, value=value, time=at, context=context))
    return valid


def checked_context(context: Any, fields: Sequence[Field], where: str) -> dict[str, Any] | None:
    """Validate the context of an event; return it as values that JSON can hold, or None if it has none.

    Args:
      context: value by field; missing values are left out.
      fields: context fields of the model.
      where: prefix of error messages.

    Raises:
      DataError: an unknown field or category, or a value of the wrong kind.
    """
    if context is not None and not isinstance(context, Mapping):
        raise DataError(f"{where}: context: expected a mapping, {{field: value}}, got {shown(context)}")
    by_name, plain = {field.name: field for field in fields}, {}
    for name, value in (context or {}).items():
        if name not in by_name:
            known = ", ".join(by_name) or "none"
            raise DataError(f"{where}: context {name!r} is unknown to the model; it knows: {known}")
        if is_missing(value):
            continue
        try:
            plain[name] = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
            json.dumps(plain[name])
            unseen = by_name[name].unseen(value)
        except (DataError, TypeError, ValueError) as error:
            raise DataError(f"{where}: context {name!r}: {error}") from error
        if unseen:
            raise DataError(
                f"{where}: context {name!r} has no category {unseen[0]!r} in the training data; leave the field out"
            )
    return plain or None


def checked_id(value: Any, kind: type | None, what: str) -> Any:
    """Validate a raw id and return it as a plain `int` or `str`."""
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, bool) or not isinstance(plain, int | str):
        raise DataError(f"{what}: an id is an integer or a string, got {value!r}")
    if kind is not None and not isinstance(plain, kind):
        raise DataError(f"{what}: ids of this model are of type {kind.__name__}, got {value!r}")
    if isinstance(plain, int) and not -(2**63) <= plain < 2**63:
        raise DataError(f"{what}: {plain} is beyond 64 bits; send it as a string")
    if isinstance(plain, str) and not 0 < len(plain) <= 256:
        raise DataError(f"{what}: an id has 1 to 256 characters, got {len(plain)}")
    return plain


def taste(
    events: list[Stored], limits: tuple[float, float], threshold: float, half_life: float | None
) -> tuple[list[Stored], np.ndarray, np.ndarray]:
    """Return the events that count, one per item, with ratings `[n]` and weights `[n]`, in order of time.

    The latest event with an item counts; a "remove" discards the events with its item before it. An event has the
    weight

        2 ** -((time of the user's latest event - its time) / half-life)

    Args:
      events: events of one user, in order of time.
      limits, threshold: see `worth`.
      half_life: in seconds; None: all weights are 1.
    """
    latest: dict[Any, Stored] = {}
    for event in events:
        latest.pop(event.item, None)
        latest[event.item] = event
    kept = [event for event in latest.values() if event.kind != "remove"]
    ratings = np.array([worth(e.kind, e.value, limits, threshold) for e in kept], np.float32)
    times = np.array([e.time for e in kept], float)
    weights = np.ones(len(kept)) if half_life is None else 0.5 ** ((times.max(initial=0) - times) / half_life)
    weights = np.maximum(weights, np.finfo(np.float32).tiny)  # weight 0 is padding
    return kept, ratings, weights.astype(np.float32)
