"""Cleaning: a declared list of rules on a table of interactions, and a report of what each one took.

A rule is a named function from a polars table with the columns `user_id`, `item_id`, `rating` and, where there is one,
`timestamp` (seconds), to the same table with fewer or mended rows.
"""

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metarec_jax.errors import DataError

if TYPE_CHECKING:
    import polars as pl

DAY = 86_400


class Rule(NamedTuple):
    """One step of cleaning.

    Attributes:
      name: for the report and for errors.
      apply: table -> (table, rows touched): dropped, or changed where the rule mends.
      needs: columns that the table must have.
    """

    name: str
    apply: Callable[["pl.DataFrame"], tuple["pl.DataFrame", int]]
    needs: tuple[str, ...] = ()


def clean(table: "pl.DataFrame", rules: Sequence[Rule]) -> tuple["pl.DataFrame", dict[str, int]]:
    """Apply the rules in order.

    Returns:
      The cleaned table, and the report: rows that each rule touched, by its name.

    Raises:
      DataError: a rule needs a column that is not there, or leaves no row; two rules have one name.
    """
    report: dict[str, int] = {}
    for rule in rules:
        if rule.name in report:
            raise DataError(f"clean: the rule {rule.name!r} is there twice; the report has one line for each")
        if missing := [column for column in rule.needs if column not in table.columns]:
            raise DataError(f"clean: the rule {rule.name!r} needs the column {missing[0]!r}; there is none")
        table, report[rule.name] = rule.apply(table)
        if not table.height:
            raise DataError(f"clean: the rule {rule.name!r} leaves no row (rows touched so far: {report}); loosen it")
    return table, report


def duplicates() -> Rule:
    """Of several interactions of one user with one item the latest stays (by time, else by row)."""

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        rows = table.with_row_index("_row")
        by = ["timestamp", "_row"] if "timestamp" in table.columns else ["_row"]
        kept = rows.sort(by).unique(["user_id", "item_id"], keep="last").sort("_row").drop("_row")
        return kept, table.height - kept.height

    return Rule("duplicates", apply)


def rating_between(low: float, high: float) -> Rule:
    """Drops ratings outside `[low, high]`, which cannot be; also NaN and nulls."""
    import polars as pl

    if not low < high:
        raise ValueError(f"need low < high, got {low} and {high}")
    return _keep("rating between", pl.col("rating").is_between(low, high), ("rating",))


def time_between(first: datetime | float, last: datetime | float) -> Rule:
    """Drops interactions outside `[first, last]`, moments or seconds since 1970: before the shop opened, or in the
    future."""
    import polars as pl

    low, high = (m.timestamp() if isinstance(m, datetime) else float(m) for m in (first, last))
    if not low < high:
        raise ValueError(f"need first < last, got {first} and {last}")
    return _keep("time between", pl.col("timestamp").is_between(low, high), ("timestamp",))


def milliseconds_to_seconds() -> Rule:
    """Divides timestamps of 10^11 and more, which as seconds lie after the year 5138, by 1000; from 10^14 on they are
    microseconds, and divided by 10^6."""
    import polars as pl

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        time = pl.col("timestamp")
        mended = pl.when(time >= 10**14).then(time // 10**6).when(time >= 10**11).then(time // 1000).otherwise(time)
        touched = table.select((time >= 10**11).sum()).item()
        return table.with_columns(mended.alias("timestamp")), int(touched)

    return Rule("milliseconds to seconds", apply, ("timestamp",))


def bots(per_day: int = 1000, per_minute: int = 60) -> Rule:
    """Drops users who interact more than `per_day` times in some calendar day (UTC) or `per_minute` times in some
    calendar minute: more than people can."""
    import polars as pl

    def busiest(seconds: int) -> "pl.Expr":
        return pl.len().over("user_id", pl.col("timestamp") // seconds).max().over("user_id")

    kept = (busiest(DAY) <= per_day) & (busiest(60) <= per_minute)
    return _keep("bots", kept, ("timestamp",))


def one_rating_users(minimum: int = 20) -> Rule:
    """Drops users with `minimum` ratings or more that are all the same: they tell nothing of what they like."""
    import polars as pl

    rating = pl.col("rating")
    same = rating.min().over("user_id") == rating.max().over("user_id")
    return _keep("one-rating users", ~(same & (pl.len().over("user_id") >= minimum)), ("rating",))


def outlier_users(deviations: float = 6.0) -> Rule:
    """Drops users whose number of interactions, on a log scale, is more than so many robust standard deviations
    (1.4826 times the median absolute deviation) above the users' median, and more than twice as high."""
    import polars as pl

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        count = table.group_by("user_id").agg(pl.len().log().alias("n"))
        logs = count["n"].to_numpy()
        middle = float(np.median(logs))
        spread = 1.4826 * float(np.median(np.abs(logs - middle)))
        usual = count.filter(pl.col("n") <= middle + max(deviations * spread, math.log(2)))  # twice is never an outlier
        kept = table.join(usual, "user_id", "semi", maintain_order="left")
        return kept, table.height - kept.height

    return Rule("outlier users", apply)


def k_core(users: int = 5, items: int = 5) -> Rule:
    """Drops users with fewer than `users` and items with fewer than `items` interactions, until none is left."""
    import polars as pl

    if users < 1 or items < 1:
        raise ValueError(f"need users >= 1 and items >= 1, got {users} and {items}")

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        before, last = table.height, -1
        while table.height != last:
            last = table.height
            enough = (pl.len().over("user_id") >= users) & (pl.len().over("item_id") >= items)
            table = table.filter(enough)
        return table, before - table.height

    return Rule("k-core", apply)


def _keep(name: str, kept: "pl.Expr", needs: tuple[str, ...]) -> Rule:
    """The rule that drops every row for which `kept` is not true."""

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        found = table.filter(kept.fill_null(False))
        return found, table.height - found.height

    return Rule(name, apply, needs)
