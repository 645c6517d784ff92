"""Recency: context columns derived from timestamps (hour, gap, session)."""

from typing import TYPE_CHECKING, Any

from metarec_jax.data.tables import seconds, to_polars

if TYPE_CHECKING:
    import polars as pl

DAYPARTS = ("night", "morning", "afternoon", "evening")  # six hours each, from midnight


def with_recency(
    interactions: Any, *, gap: float = 1800, utc_offset: float = 0, user: str = "user_id", time: str = "timestamp"
) -> "pl.DataFrame":
    """Add six context columns derived from timestamps; none depends on later interactions.

    The columns are `hour` ("00" to "23"), `weekday` ("1", Monday, to "7"), `daypart` (`DAYPARTS`), `since_previous`
    (seconds since the user's previous interaction, null for the first; `fields={"since_previous": {"transform":
    "log"}}` suits it), `session` ("USER/N", a new one after each gap of more than `gap`) and `session_position` (from
    0). Pass them as `context` of `from_tables`. Interactions of the same second count in row order. The order of the
    rows does not change.

    Args:
      interactions: any table that `from_tables` accepts.
      gap: seconds without an interaction that end a session.
      utc_offset: hours from UTC of the clock for hours and days.
      user, time: names of the user and timestamp columns.

    Raises:
      DataError: a timestamp is missing or not in seconds; a column is missing.
      ValueError: `gap` is not above 0.

    Example:
      The third play comes more than half an hour after the second:

      >>> table = mr.data.with_recency({"user_id": [1, 1, 1], "item_id": [7, 8, 9], "timestamp": [0, 600, 7200]})
      >>> table.select("hour", "since_previous", "session", "session_position").rows()
      [('00', None, '1/0', 0), ('00', 600, '1/0', 1), ('02', 6600, '1/1', 0)]
    """
    import polars as pl

    if not gap > 0:
        raise ValueError(f"gap must be above 0 seconds, got {gap}")
    table = to_polars(interactions, "interactions")
    clock = pl.from_epoch(pl.col("_time") + round(3600 * utc_offset))
    daypart = pl.col("_part").replace_strict(dict(enumerate(DAYPARTS)), return_dtype=pl.String)
    rows = table.with_columns(pl.Series("_time", seconds(table, time, "interactions"))).with_row_index("_row")
    rows = rows.sort("_time", "_row").with_columns(
        clock.dt.strftime("%H").alias("hour"),
        clock.dt.weekday().cast(pl.String).alias("weekday"),
        (clock.dt.hour() // 6).alias("_part"),
        pl.col("_time").diff().over(user).alias("since_previous"),
    )
    number = (pl.col("since_previous") > gap).fill_null(False).cum_sum().over(user)
    rows = rows.with_columns(daypart.alias("daypart"), pl.format("{}/{}", user, number).alias("session"))
    position = pl.int_range(pl.len()).over("session").alias("session_position")
    return rows.with_columns(position).sort("_row").drop("_row", "_time", "_part")
