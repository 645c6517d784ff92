"""Recency columns against a plain loop, and that nothing later changes them."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

import metarec_jax as mr
from metarec_jax.data.recency import with_recency
from metarec_jax.errors import DataError

NEW = ["hour", "weekday", "daypart", "since_previous", "session", "session_position"]


def table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    times = 1_700_000_000 + rng.integers(0, 40, n) * 600
    users = rng.integers(4, size=n)
    return pl.DataFrame({"user_id": users, "item_id": np.arange(n), "rating": 1.0, "timestamp": times})


def test_columns_are_those_of_a_plain_loop():
    rows = table()
    got = with_recency(rows, gap=1500, utc_offset=2)
    last, session, place = {}, {}, {}
    expected = {}
    for user, item, _, time in sorted(rows.rows(), key=lambda r: (r[3], r[1])):
        since = time - last[user] if user in last else None
        if user not in last or (since is not None and since > 1500):
            session[user] = session.get(user, -1) + 1
            place[user] = -1
        last[user], place[user] = time, place[user] + 1
        clock = datetime.fromtimestamp(time + 7200, UTC)
        part = ["night", "morning", "afternoon", "evening"][clock.hour // 6]
        weekday = str(clock.isoweekday())
        expected[item] = (f"{clock.hour:02}", weekday, part, since, f"{user}/{session[user]}", place[user])
    assert got["item_id"].to_list() == rows["item_id"].to_list()
    assert dict(zip(got["item_id"], got.select(NEW).rows(), strict=True)) == expected


def test_nothing_later_changes_what_an_interaction_is_told():
    rows = table().sort("timestamp", maintain_order=True)
    whole = with_recency(rows)
    for cut in (1, 17, 40):
        assert with_recency(rows.head(cut)).equals(whole.head(cut))


def test_they_are_read_as_context_and_models_train_on_them():
    rng = np.random.default_rng(0)
    rows = {
        "user_id": np.repeat(np.arange(30), 20),
        "item_id": np.concatenate([rng.permutation(25)[:20] for _ in range(30)]),
        "rating": rng.integers(1, 6, 600).astype(float),
        "timestamp": 1_700_000_000 + rng.integers(0, 10**6, 600),
    }
    fields = {"since_previous": {"transform": "log"}}
    data = mr.data.from_tables(with_recency(rows), context=["daypart", "since_previous"], fields=fields)
    assert [(f.name, f.kind, f.transform) for f in data.context_fields] == [
        ("daypart", "categorical", None), ("since_previous", "dense", "log")
    ]  # fmt: skip
    trained = mr.train(data, "ridge", objective="click", epochs=1, progress=False, buckets=1)
    assert np.isfinite(trained.history[0]["log_loss"])


def test_times_that_cannot_be_used_are_refused():
    rows = table()
    with pytest.raises(DataError, match="milliseconds"):
        with_recency(rows.with_columns(pl.col("timestamp") * 1000))
    with pytest.raises(DataError, match="'timestamp'"):
        with_recency(rows.with_columns(pl.lit(None).alias("timestamp")))
    with pytest.raises(DataError, match="'timestamp' is missing"):
        with_recency(rows.drop("timestamp"))
    with pytest.raises(ValueError, match="gap"):
        with_recency(rows, gap=0)
