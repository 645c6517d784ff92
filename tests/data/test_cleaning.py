"""Cleaning: each rule drops what a plain loop drops, says how many, and never empties a table silently."""

from collections import Counter
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metarec_jax as mr
from metarec_jax.data.cleaning import (
    Rule,
    bots,
    clean,
    duplicates,
    k_core,
    milliseconds_to_seconds,
    one_rating_users,
    outlier_users,
    rating_between,
    time_between,
)  # fmt: skip
from metarec_jax.errors import DataError

NOW = 1_700_000_000


def table(rows: list[tuple[int, int, float, int]]) -> pl.DataFrame:
    schema = {"user_id": pl.Int64, "item_id": pl.Int64, "rating": pl.Float64, "timestamp": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def after(rule: Rule, rows: list[tuple[int, int, float, int]]) -> list[tuple[int, int, float, int]]:
    """The rows that the rule leaves; the report must say how many went."""
    left, report = clean(table(rows), [rule])
    assert report == {rule.name: len(rows) - left.height}
    return left.rows()


interactions = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1.0, 3.0, 5.0]), st.integers(NOW, NOW + 4)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(interactions)
def test_of_duplicates_the_latest_stays(rows):
    latest: dict[tuple[int, int], int] = {}
    for i, (user, item, _, time) in enumerate(rows):
        if (user, item) not in latest or time >= rows[latest[user, item]][3]:
            latest[user, item] = i
    assert after(duplicates(), rows) == [rows[i] for i in sorted(latest.values())]


@settings(max_examples=40, deadline=None)
@given(interactions, st.integers(1, 4), st.integers(1, 4))
def test_the_core_is_what_is_left_when_nobody_has_too_few(rows, users, items):
    left, last = rows, None
    while left != last:
        last = left
        by_user, by_item = Counter(r[0] for r in left), Counter(r[1] for r in left)
        left = [r for r in left if by_user[r[0]] >= users and by_item[r[1]] >= items]
    if left:
        assert after(k_core(users, items), rows) == left
    else:
        with pytest.raises(DataError, match="'k-core' leaves no row"):
            after(k_core(users, items), rows)


def test_impossible_ratings_and_times_go():
    rows = [(1, 1, 5.0, NOW), (1, 2, 5.5, NOW), (1, 3, float("nan"), NOW), (1, 4, 0.5, NOW), (1, 5, 3.0, NOW + 10)]
    assert after(rating_between(1, 5), rows) == [rows[0], rows[4]]
    assert after(time_between(datetime(2020, 1, 1, tzinfo=UTC), NOW), rows[:2]) == rows[:2]
    assert after(time_between(NOW + 1, NOW + 10), rows) == [rows[4]]


def test_milliseconds_and_microseconds_become_seconds_and_are_counted():
    rows = [(1, 1, 5.0, NOW), (1, 2, 5.0, NOW * 1000 + 7), (1, 3, 5.0, NOW * 10**6)]
    mended, report = clean(table(rows), [milliseconds_to_seconds()])
    assert mended["timestamp"].to_list() == [NOW] * 3
    assert report == {"milliseconds to seconds": 2}


def test_bots_are_too_quick_for_people():
    human = [(1, i, 3.0, NOW + 60 * i) for i in range(30)]
    minute = [(2, i, 3.0, NOW // 60 * 60 + i % 50) for i in range(30)]
    day = [(3, i, 3.0, NOW // 86_400 * 86_400 + 600 * i) for i in range(130)]
    assert after(bots(per_day=100, per_minute=20), human + minute + day) == human


def test_users_who_rate_everything_alike_go_when_they_rate_much():
    same, few = [(1, i, 5.0, NOW) for i in range(20)], [(2, i, 5.0, NOW) for i in range(19)]
    varied = [(3, i, 4.0 + (i == 7), NOW) for i in range(30)]
    assert after(one_rating_users(20), same + few + varied) == few + varied


def test_users_far_more_active_than_the_others_go():
    usual = [(u, i, 3.0, NOW) for u in range(20) for i in range(8 + u % 5)]
    assert after(outlier_users(), usual + [(99, i, 3.0, NOW) for i in range(5000)]) == usual
    alike = [(u, i, 3.0, NOW) for u in range(20) for i in range(10)]
    assert after(outlier_users(), [*alike, (0, 11, 3.0, NOW)]) == [*alike, (0, 11, 3.0, NOW)]


def test_a_dataset_tells_what_cleaning_did_and_a_model_keeps_it(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        "who": np.repeat(np.arange(40), 20),
        "what": np.concatenate([rng.permutation(30)[:20] for _ in range(40)]),
        "stars": rng.integers(1, 6, 800).astype(float),
        "timestamp": np.full(800, NOW),
    }
    rows["stars"][:3] = 99
    rules = [rating_between(1, 5), k_core(18, 1)]
    names = {"user_id": "who", "item_id": "what", "rating": "stars"}
    data = mr.data.from_tables(rows, columns=names, clean=rules)
    expected = {"rows": 800, "rating between": 3, "k-core": 17, "duplicates": 0}
    assert data.report == expected
    assert len(data.rating) == 780
    trained = mr.train(data, "ridge", objective="click", epochs=1, progress=False, buckets=1)
    trained.save(tmp_path / "model")
    assert mr.load(tmp_path / "model").catalogue.report == expected


def test_times_in_milliseconds_are_refused_with_the_cure():
    rows = {"user_id": [1, 1], "item_id": [1, 2], "rating": [5, 4], "timestamp": [NOW, NOW * 1000]}
    with pytest.raises(DataError, match=r"row 1.*milliseconds_to_seconds"):
        mr.data.from_tables(rows)
    assert mr.data.from_tables(rows, clean=[milliseconds_to_seconds()]).timestamp.tolist() == [NOW, NOW]


def test_a_rule_without_its_column_or_given_twice_is_refused():
    rows = table([(1, 1, 5.0, NOW)])
    with pytest.raises(DataError, match="'bots' needs the column 'timestamp'"):
        clean(rows.drop("timestamp"), [bots()])
    with pytest.raises(DataError, match="'k-core' is there twice"):
        clean(rows, [k_core(1, 1), k_core(1, 1)])
    for wrong in (lambda: rating_between(5, 1), lambda: time_between(2, 1), lambda: k_core(0, 1)):
        with pytest.raises(ValueError, match="need"):
            wrong()
