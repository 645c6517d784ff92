"""Cleaning: rules that drop or correct rows of an interaction table, with a report.

A rule maps a polars table with the columns `user_id`, `item_id`, `rating` and, optionally, `timestamp` (seconds) to the
same table with fewer or corrected rows.
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
    """One cleaning step.

    Attributes:
      name: the name in reports and errors.
      apply: table -> (table, number of rows dropped or changed).
      needs: required columns.

    Example:
      A rule of your own, which drops the test account:

      >>> import polars as pl
      >>> def without_tests(table):
      ...     kept = table.filter(pl.col("user_id") != "test")
      ...     return kept, table.height - kept.height
      >>> plays = {"user_id": ["ann", "test"], "item_id": [7, 8]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.Rule("test account", without_tests)]).report
      {'rows': 2, 'test account': 1, 'duplicates': 0}
    """

    name: str
    apply: Callable[["pl.DataFrame"], tuple["pl.DataFrame", int]]
    needs: tuple[str, ...] = ()


def clean(table: "pl.DataFrame", rules: Sequence[Rule]) -> tuple["pl.DataFrame", dict[str, int]]:
    """Apply cleaning rules in order.

    Args:
      table: the interactions.
      rules: the rules, with distinct names.

    Returns:
      The cleaned table, and a report: the number of rows that each rule touched, by name.

    Raises:
      DataError: a rule needs a missing column or leaves no row; or two rules have the same name.

    Example:
      >>> import polars as pl
      >>> table = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [7, 7, 8], "rating": [4.0, 5.0, 11.0]})
      >>> rules = [mr.data.cleaning.rating_between(1, 5), mr.data.cleaning.duplicates()]
      >>> table, report = mr.data.cleaning.clean(table, rules)
      >>> table.rows(), report
      ([(1, 7, 5.0)], {'rating between': 1, 'duplicates': 1})
    """
    report: dict[str, int] = {}
    for rule in rules:
        if rule.name in report:
            raise DataError(f"clean: the rule {rule.name!r} is there twice; give each rule once")
        if missing := [column for column in rule.needs if column not in table.columns]:
            raise DataError(f"clean: the rule {rule.name!r} needs the column {missing[0]!r}; add it or drop the rule")
        table, report[rule.name] = rule.apply(table)
        if not table.height:
            raise DataError(f"clean: the rule {rule.name!r} leaves no row (rows touched so far: {report}); loosen it")
    return table, report


def duplicates() -> Rule:
    """Keep the latest of several interactions of one user with one item (by time, then by row).

    Example:
      >>> plays = {"user_id": [1, 1], "item_id": [7, 7], "rating": [2, 5]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.duplicates()]).rating
      array([5.], dtype=float32)
    """

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        rows = table.with_row_index("_row")
        by = ["timestamp", "_row"] if "timestamp" in table.columns else ["_row"]
        kept = rows.sort(by).unique(["user_id", "item_id"], keep="last").sort("_row").drop("_row")
        return kept, table.height - kept.height

    return Rule("duplicates", apply)


def rating_between(low: float, high: float) -> Rule:
    """Drop invalid ratings: outside `[low, high]`, NaN or null.

    Raises:
      ValueError: `low` is not below `high`.

    Example:
      >>> plays = {"user_id": [1, 1, 1], "item_id": [7, 8, 9], "rating": [5.0, 11.0, float("nan")]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.rating_between(1, 5)]).rating
      array([5.], dtype=float32)
    """
    import polars as pl

    if not low < high:
        raise ValueError(f"need low < high, got {low} and {high}")
    return _keep("rating between", pl.col("rating").is_between(low, high), ("rating",))


def time_between(first: datetime | float, last: datetime | float) -> Rule:
    """Drop interactions outside `[first, last]`, for instance before the shop opened or in the future.

    Args:
      first, last: datetimes, or seconds since 1970.

    Raises:
      ValueError: `first` is not before `last`.

    Example:
      >>> plays = {"user_id": [1, 1], "item_id": [7, 8], "timestamp": [50, 150]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.time_between(100, 200)]).timestamp
      array([150])
    """
    import polars as pl

    low, high = (m.timestamp() if isinstance(m, datetime) else float(m) for m in (first, last))
    if not low < high:
        raise ValueError(f"need first < last, got {first} and {last}")
    return _keep("time between", pl.col("timestamp").is_between(low, high), ("timestamp",))


def milliseconds_to_seconds() -> Rule:
    """Convert timestamps in milliseconds or microseconds to seconds.

    Values of 10^11 and more, which as seconds lie after the year 5138, are divided by 1000; values of 10^14 and more
    are divided by 10^6.

    Example:
      >>> plays = {"user_id": [1, 1], "item_id": [7, 8], "timestamp": [1_700_000_000, 1_700_000_000_000]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.milliseconds_to_seconds()]).timestamp
      array([1700000000, 1700000000])
    """
    import polars as pl

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        time = pl.col("timestamp")
        mended = pl.when(time >= 10**14).then(time // 10**6).when(time >= 10**11).then(time // 1000).otherwise(time)
        touched = table.select((time >= 10**11).sum()).item()
        return table.with_columns(mended.alias("timestamp")), int(touched)

    return Rule("milliseconds to seconds", apply, ("timestamp",))


def bots(per_day: int = 1000, per_minute: int = 60) -> Rule:
    """Drop users whose activity exceeds human rates.

    Args:
      per_day: most interactions in a calendar day (UTC).
      per_minute: most interactions in a calendar minute.

    Example:
      User 1 plays four items within four seconds:

      >>> plays = {"user_id": [1, 1, 1, 1, 2], "item_id": [7, 8, 9, 10, 7], "timestamp": [0, 1, 2, 3, 0]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.bots(per_minute=3)]).users.ids
      array([2])
    """
    import polars as pl

    def busiest(seconds: int) -> "pl.Expr":
        return pl.len().over("user_id", pl.col("timestamp") // seconds).max().over("user_id")

    kept = (busiest(DAY) <= per_day) & (busiest(60) <= per_minute)
    return _keep("bots", kept, ("timestamp",))


def one_rating_users(minimum: int = 20) -> Rule:
    """Drop users with at least `minimum` ratings that are all equal: they carry no preference.

    Example:
      >>> plays = {"user_id": [1, 1, 1, 2, 2, 2], "item_id": [7, 8, 9] * 2, "rating": [5, 5, 5, 5, 4, 5]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.one_rating_users(minimum=3)]).users.ids
      array([2])
    """
    import polars as pl

    rating = pl.col("rating")
    same = rating.min().over("user_id") == rating.max().over("user_id")
    return _keep("one-rating users", ~(same & (pl.len().over("user_id") >= minimum)), ("rating",))


def outlier_users(deviations: float = 6.0) -> Rule:
    """Drop users with an outlying number of interactions.

    The log count of such a user is more than `deviations` robust standard deviations (1.4826 times the median absolute
    deviation) above the median, and the count more than twice the median.

    Example:
      Users 1 and 2 have two interactions, user 3 has nine:

      >>> plays = {"user_id": [1, 1, 2, 2] + [3] * 9, "item_id": [1, 2, 1, 2, *range(9)]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.outlier_users()]).users.ids
      array([1, 2])
    """
    import polars as pl

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        count = table.group_by("user_id").agg(pl.len().log().alias("n"))
        logs = count["n"].to_numpy()
        middle = float(np.median(logs))
        spread = 1.4826 * float(np.median(np.abs(logs - middle)))
        # up to twice the median is never an outlier
        usual = count.filter(pl.col("n") <= middle + max(deviations * spread, math.log(2)))
        kept = table.join(usual, "user_id", "semi", maintain_order="left")
        return kept, table.height - kept.height

    return Rule("outlier users", apply)


def k_core(users: int = 5, items: int = 5) -> Rule:
    """Drop rare users and items repeatedly, until none is left.

    Args:
      users: fewest interactions of a user.
      items: fewest interactions of an item.

    Raises:
      ValueError: `users` or `items` is below 1.

    Example:
      Item 9 has one user. Without it user 3 has one item:

      >>> plays = {"user_id": [1, 1, 2, 2, 3, 3], "item_id": [7, 8, 7, 8, 7, 9]}
      >>> mr.data.from_tables(plays, clean=[mr.data.cleaning.k_core(users=2, items=2)]).users.ids
      array([1, 2])
    """
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
    """Build the rule that keeps the rows for which `kept` is true; null is false."""

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        remaining = table.filter(kept.fill_null(False))
        return remaining, table.height - remaining.height

    return Rule(name, apply, needs)
