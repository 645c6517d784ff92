"""Arguments: what is typed, as data, protocols and histories."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click

COLUMN = click.option(
    "--column",
    multiple=True,
    metavar="NAME=YOURS",
    help="Your column names, e.g. --column rating=stars. Repeatable.",
)
ITEMS = click.option("--item-table", type=click.Path(), default=None, help="Table of items: item_id and attributes.")
USERS = click.option("--user-table", type=click.Path(), default=None, help="Table of users: user_id and attributes.")
PROTOCOL = click.option(
    "--protocol",
    default=None,
    help="Who trains and who is judged: StrongGeneralisation, NextItem, ColdUsers, TimeSplit or Scenario.  "
    "[default: what suits the objective]",
)
SETTING = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the protocol, e.g. --set held_out=0.1. Repeatable.",
)


def read(data: str, column: tuple[str, ...] = (), items: str | None = None, users: str | None = None) -> Any:
    """The dataset of a name or path, with tables of items and users beside it."""
    from metarec_jax.data import from_tables, load, read_table

    if (items is not None or users is not None) and not Path(data).exists():
        raise click.UsageError(f"--item-table and --user-table go with a table of interactions; {data} is no file")
    if not column and items is None and users is None:
        return load(data)
    return from_tables(
        read_table(data),
        users=None if users is None else read_table(users),
        items=None if items is None else read_table(items),
        columns=dict(pairs(column)),
        name=Path(data).stem,
    )


def protocol_of(
    objective: str, name: str | None, settings: tuple[str, ...], given: dict[str, Any], default: dict[str, Any]
) -> Any:
    """The protocol that is meant.

    Args:
      objective: "ranking", "click" or "rating".
      name: of the protocol; None: the objective's own.
      settings: texts "NAME=VALUE".
      given: settings with options of their own that were typed.
      default: settings of the objective's own protocol.
    """
    from metarec_jax.tasks.protocols import PROTOCOLS

    own = "StrongGeneralisation" if objective == "ranking" else "ColdUsers"
    if name is not None and name not in PROTOCOLS:
        raise click.UsageError(f"--protocol {name} is unknown; choose from {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name or own]
    known = {field.name for field in fields(protocol)}
    values = {**(default if name in (None, own) else {}), **given}
    for setting, text in pairs(settings):
        try:
            values[setting] = json.loads(text)
        except ValueError:
            values[setting] = text
    if unknown := sorted(values.keys() - known):
        raise click.UsageError(
            f"{protocol.__name__} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}, as "
            f"--set {sorted(known)[0]}=VALUE"
        )
    if "target" in known:
        values.setdefault("target", objective)
    for field in fields(protocol):
        if isinstance(values.get(field.name), str) and not any(isinstance(x, str) for x in get_args(field.type)):
            raise click.UsageError(f"--set {field.name}: expected numbers, got {values[field.name]!r}")
    try:
        return protocol(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    except TypeError as error:
        raise click.UsageError(f"{protocol.__name__} does not take these settings: {values} ({error})") from error


def pairs(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Split texts "NAME=VALUE" into names and values."""
    for text in texts:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} should look like NAME=VALUE")
    return [(left, right) for left, _, right in (text.rpartition("=") for text in texts)]


def number(text: str, kind: type, what: str) -> Any:
    """Convert a text to `int` or `float`; `what` is its name in the error message."""
    try:
        return kind(text)
    except ValueError as error:
        raise click.BadParameter(f"{what} {text!r} is no {'integer' if kind is int else 'number'}") from error


def item_id(recommender: Any, text: str) -> Any:
    """Convert a text to the type of the model's item ids."""
    return number(text, int, "item id") if recommender.stock.trained.ids.dtype.kind == "i" else text


def history(recommender: Any, texts: tuple[str, ...]) -> list[Any]:
    """Of "ITEM=RATING" (item, rating), of "ITEM" the item."""
    found: list[Any] = []
    for text in texts:
        left, equals, right = text.rpartition("=")
        item = item_id(recommender, left if equals else text)
        found.append((item, number(right, float, "rating")) if equals else item)
    return found


def among(candidates: str) -> Any:
    """Convert "query", "all" or a number of sampled items."""
    return int(candidates) if candidates.isdigit() else candidates
