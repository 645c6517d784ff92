"""Recency: timestamps as columns that tell when, how long after, and in which session a user acted."""

from typing import TYPE_CHECKING, Any

from metarec_jax.data.tables import seconds, to_polars

if TYPE_CHECKING:
    import polars as pl

DAYPARTS = ("night", "morning", "afternoon", "evening")  # of six hours each, from midnight


def with_recency(
    interactions: Any, *, gap: float = 1800, utc_offset: float = 0, user: str = "user_id", time: str = "timestamp"
) -> "pl.DataFrame":
    """The interactions with six more columns, made from nothing that comes later; give them as `context`.

    `hour` ("00" to "23"), `weekday` ("1", Monday, to "7"), `daypart`; `since_previous`, seconds since the same user's
    interaction before (null for the first; `fields={"since_previous": {"transform": "log"}}` suits it); `session`,
    "USER/N", a new one wherever that is more than `gap`; `session_position`, from 0. Interactions of one second are in
    the order of their rows, which stay in their places.

    Args:
      interactions: any table that `from_tables` takes.
      gap: seconds of rest that end a session.
      utc_offset: hours from UTC of the clock that hours and days are read from.
      user, time: names of the two columns.

    Raises:
      DataError: a timestamp is missing or in another unit than seconds; a column is missing.
      ValueError: `gap` is not above 0.
    """
    import polars as pl

    if not gap > 0:
        raise ValueError(f"gap must be above 0 seconds, got {gap}")
    table = to_polars(interactions, "interactions")
    clock = pl.from_epoch(pl.col("_time") + round(3600 * utc_offset))
    named = pl.col("_part").replace_strict(dict(enumerate(DAYPARTS)), return_dtype=pl.String)
    rows = table.with_columns(pl.Series("_time", seconds(table, time, "interactions"))).with_row_index("_row")
    rows = rows.sort("_time", "_row").with_columns(
        clock.dt.strftime("%H").alias("hour"),
        clock.dt.weekday().cast(pl.String).alias("weekday"),
        (clock.dt.hour() // 6).alias("_part"),
        pl.col("_time").diff().over(user).alias("since_previous"),
    )
    number = (pl.col("since_previous") > gap).fill_null(False).cum_sum().over(user)
    rows = rows.with_columns(named.alias("daypart"), pl.format("{}/{}", user, number).alias("session"))
    position = pl.int_range(pl.len()).over("session").alias("session_position")
    return rows.with_columns(position).sort("_row").drop("_row", "_time", "_part")
