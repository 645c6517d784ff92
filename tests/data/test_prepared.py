"""Prepared histories as one dataset: what `from_tables` makes of the same tables, memory-mapped, and trained from."""

import shutil
from collections import namedtuple

import numpy as np
import polars as pl
import pytest

import metarec_jax as mr
from metarec_jax.data.fingerprint import fingerprint
from metarec_jax.errors import DataError

ITEMS = {"item_id": ["i1", "i4", "new"], "genre": ["a", "b", "a"], "title": ["One", "Four", "New"]}


def log(rows=900, users=40, items=30):
    """Interactions, some of them twice, without equal times of one user."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    names = {"user_id": [f"u{u}" for u in user], "item_id": [f"i{i}" for i in item]}
    return pl.DataFrame(names | {"rating": rng.integers(1, 6, rows), "timestamp": rng.permutation(rows)})


def prepare(table, folder):
    table.write_parquet(folder / "log.parquet")
    return mr.data.prepare(folder / "log.parquet", folder / "out", shards=5, piece=200, progress=False)


@pytest.mark.parametrize("options", [{}, {"items": ITEMS, "users": {"user_id": ["u0", "new"], "age": [3.0, 4.0]}}])
def test_it_is_the_dataset_of_the_tables(options, tmp_path):
    table = log()
    joined, expected = prepare(table, tmp_path).dataset(**options), mr.data.from_tables(table, **options)
    by_user = expected.by_user
    for name in ("user", "item", "rating", "timestamp"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(expected, name)[by_user])
        assert getattr(joined, name).dtype == getattr(expected, name).dtype
    assert joined.users.ids.tolist() == expected.users.ids.tolist()
    assert joined.items.ids.tolist() == expected.items.ids.tolist()
    for name, array in (expected.item_features | expected.user_features).items():
        np.testing.assert_array_equal((joined.item_features | joined.user_features)[name], array)
    if options:
        assert joined.titles.tolist() == expected.titles.tolist()
    np.testing.assert_array_equal(joined.by_user, np.arange(len(by_user)))
    np.testing.assert_array_equal(joined.order, expected.order[by_user])


def test_columns_are_read_from_the_disk_and_joined_once(tmp_path):
    prepared = prepare(log(), tmp_path)
    first = prepared.dataset()
    assert isinstance(first.rating.base, np.memmap)
    written = (tmp_path / "out/whole/rating.npy").stat().st_mtime_ns
    assert fingerprint(mr.data.Prepared.open(tmp_path / "out").dataset()) == fingerprint(first)
    assert (tmp_path / "out/whole/rating.npy").stat().st_mtime_ns == written
    assert not list((tmp_path / "out").glob(".whole*"))


def test_two_processes_may_join_at_once(tmp_path, monkeypatch):
    """The slower one finds the folder there and reads it."""
    prepared = prepare(log(), tmp_path)
    prepared.dataset()
    exists = type(tmp_path).exists
    asked = []

    def not_yet(path):
        asked.append(path.name)
        return False if asked == ["whole"] else exists(path)

    monkeypatch.setattr(type(tmp_path), "exists", not_yet)
    assert prepared.dataset().rating.size == prepared.report["rows"] - prepared.report["duplicates"]


def test_a_disk_without_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    prepared = prepare(log(), tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(100))
    with pytest.raises(DataError, match=r"the joined columns take [\d,]+ bytes, 100 are free; make space there"):
        prepared.dataset()
    assert not (tmp_path / "out/whole").exists()


def test_bad_attribute_tables_are_named(tmp_path):
    prepared = prepare(log(), tmp_path)
    with pytest.raises(DataError, match="stands in more than one row"):
        prepared.dataset(items={"item_id": ["i1", "i1"], "genre": ["a", "b"]})
    with pytest.raises(DataError, match="another type"):
        prepared.dataset(items={"item_id": [1, 2], "genre": ["a", "b"]})
    with pytest.raises(DataError, match="fields: there is no column 'price'"):
        prepared.dataset(items=ITEMS, fields={"price": {"transform": "log"}})


def test_it_trains_as_the_tables_do(tmp_path):
    """Without a table of ratings every interaction is a positive."""
    table = log(1500).drop("rating")
    prepared, options = prepare(table, tmp_path), {"epochs": 2, "progress": False}
    recommender = mr.train(prepared, "ials", **options)
    expected = mr.train(mr.data.from_tables(table.sort("user_id", "timestamp")), "ials", **options)
    assert recommender.recommend(["i1", "i2"], k=5) == expected.recommend(["i1", "i2"], k=5)
    for ours, theirs in zip(recommender.trained.history, expected.trained.history, strict=True):
        assert ours == pytest.approx(theirs)


def test_beyond_many_users_tables_are_fitted_without_those_that_train(monkeypatch):
    """The loss never sees a user whom its tables were fitted to, and every epoch draws the same held-out users."""
    from metarec_jax.training import sources

    monkeypatch.setattr(sources, "MANY", 50)
    monkeypatch.setattr(sources, "HELD_OUT", 20)
    fitted, drawn_users = [], []
    tables, draw = sources.fitted_tables, sources.drawn

    def spied(strategy, observed):
        fitted.append(observed.users)
        return tables(strategy, observed)

    def watched(histories, *args, fold, **kwargs):
        drawn_users.append(set(histories.users[fold == 0]))
        return draw(histories, *args, fold=fold, **kwargs)

    monkeypatch.setattr(sources, "fitted_tables", spied)
    monkeypatch.setattr(sources, "drawn", watched)
    mr.train(mr.data.synthetic(users=100, items=40), "ials", epochs=3, ratings=None, progress=False)
    assert len(fitted) == 2
    assert max(fitted) - min(fitted) == 20  # all training users, and all but the held-out
    assert len(drawn_users) == 3
    assert all(users == drawn_users[0] and len(users) == 20 for users in drawn_users)
