"""Users of the dataset: recommended to by their ids, one or all; tables and frames as data and as histories."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

import metarec_jax as mr
from metarec_jax.errors import DataError


@pytest.fixture(scope="module")
def table():
    """Plays of users of two kinds, each of whom plays its own half of the items."""
    rng = np.random.default_rng(0)
    rows = [(f"u{u:03}", f"s{i:02}") for u in range(100) for i in rng.choice(np.arange(u % 2, 40, 2), 8, replace=False)]
    return pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")


@pytest.fixture(scope="module")
def recommender(table):
    return mr.train(table, progress=False)


def of(table, user):
    return table.filter(pl.col("user_id") == user)


def assert_alike(found, expected):
    """The same scores in the same order; near ties may change places with the shapes of what is computed."""
    np.testing.assert_allclose([r.score for r in found], [r.score for r in expected], rtol=1e-4, atol=1e-4)


def test_a_table_alone_is_trained_on_and_what_is_used_is_said(table, capsys):
    mr.train(pl.concat([table, pl.DataFrame({"user_id": ["new"], "item_id": ["s00"]})]).to_pandas(), "ease", epochs=1)
    said = capsys.readouterr().out
    assert "StrongGeneralisation: 80 users train on 640 of 801 interactions, 10 validate, 10 test" in said
    assert "1 users have too few interactions for StrongGeneralisation" in said


def test_a_user_of_the_dataset_is_known_by_id(recommender, table):
    own = of(table, "u003")["item_id"].to_list()
    found = recommender.recommend_to("u003", k=5)
    assert_alike(found, recommender.recommend(own, k=5))
    assert not {r.item for r in found} & set(own)
    nobody, other = recommender.batch.recommend_to(["nobody", "u004"], k=5)
    assert_alike(nobody, recommender.recommend([], k=5))
    assert all(int(r.item[1:]) % 2 == 0 for r in other)
    assert {cause.item for cause in recommender.explain("u003", found[0].item).causes} == set(own)


def test_events_come_after_what_the_dataset_holds(recommender, table):
    live = recommender.with_users(":memory:")
    own = of(table, "u003")["item_id"].to_list()
    live.update([{"user": "u003", "item": "s00", "kind": "click"}, {"user": "u003", "item": own[0], "kind": "remove"}])
    found = live.recommend_to("u003", k=40)
    assert {r.item for r in found} == set(table["item_id"]) - set(own[1:]) - {"s00"}
    assert_alike(found[:5], live.recommend([*own[1:], "s00"], k=5))


def test_attributes_and_ratings_of_the_dataset_count():
    data = mr.data.synthetic(users=120, items=40, seed=1)
    recommender = mr.train(data, "ease", epochs=1, progress=False, ratings=None)
    user = int(data.users.ids[4])
    own = np.flatnonzero(data.user == 5)
    history = {int(i): float(r) for i, r in zip(data.items.decode(data.item[own]), data.rating[own], strict=True)}
    (person,) = recommender.batch.remembered([user])
    assert all(np.array_equal(person.attributes[name], table[5]) for name, table in data.user_features.items())
    assert {r.item for r in recommender.recommend_to(user, k=40)} == set(data.items.ids.tolist()) - set(history)
    np.testing.assert_array_equal(np.sort(person.ratings), np.sort(data.rating[own]))


def test_all_users_come_as_one_table(recommender, table, tmp_path, monkeypatch):
    found = recommender.recommend_all(k=3, block=["s00"])
    assert found.columns == ["user_id", "item_id", "rank", "score"]
    assert found.height == 300
    users = sorted(set(table["user_id"]))
    for user, own in zip(users, recommender.batch.recommend_to(users, k=3, block=["s00"]), strict=True):
        rows = found.filter(pl.col("user_id") == user)
        assert rows["item_id"].to_list() == [r.item for r in own]
        assert rows["rank"].to_list() == [1, 2, 3]
        assert rows["score"].is_sorted(descending=True)
    assert recommender.recommend_all(users=["u003"]).height == 10
    assert recommender.recommend_all(users=[]).schema == found.schema
    drawn = {"k": 3, "users": users[:3], "explore": "thompson", "seed": [1, 2, 3]}
    whole = recommender.batch.recommend_to(drawn["users"], 3, explore="thompson", seed=[1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr("metarec_jax.batch.CHUNK", 2)
        in_chunks = recommender.recommend_all(**drawn)
    assert in_chunks["item_id"].to_list() == [r.item for own in whole for r in own]
    with pytest.raises(mr.OptionError, match="seed: got 3 entries for 100 users"):
        recommender.recommend_all(k=3, seed=[1, 2, 3])
    with pytest.raises(mr.OptionError, match="no column for deviations"):
        recommender.recommend_all(k=3, deviation=True)
    for path in (tmp_path / "lists.csv", tmp_path / "nowhere" / "lists.parquet"):
        with pytest.raises(DataError, match=r"expected a [.]parquet file in a folder"):
            recommender.recommend_all(k=3, path=path)
    for call, message in (
        (lambda: recommender.batch.recommend([(3, 5), (4, 1)]), r"history 0: \(3, 5\) is one interaction"),
        (lambda: recommender.recommend(["s04"], user=[{"age": 3}]), "user attribute: expected a mapping"),
        (lambda: recommender.recommend(["s04"], context="phone"), "context: expected a mapping"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(TypeError, match=r"batch.recommend\(\) got an unexpected keyword argument 'user'.*users=\["):
        recommender.batch.recommend([["s04"]], user=[{}])
    written = recommender.recommend_all(k=3, path=tmp_path / "lists.parquet", block=["s00"])
    assert written.equals(found)
    assert pl.read_parquet(tmp_path / "lists.parquet").equals(found)
    assert recommender.recommend_all(users=[]).height == 0
    for users, message in (("u003", "expected a list of ids"), (3, "expected a list"), ([1, "u003"], "are mixed")):
        with pytest.raises(DataError, match=message):
            recommender.recommend_all(users=users)
    recommender.save(tmp_path / "model")
    with pytest.raises(DataError, match=r"recommend_all\(k, users="):
        mr.load(tmp_path / "model").recommend_all()


def test_similar_items_are_those_of_the_same_kind(recommender):
    found = recommender.similar_items("s04", k=6)
    assert "s04" not in {r.item for r in found}
    assert all(int(r.item[1:]) % 2 == 0 for r in found)
    assert all(-1.001 <= r.score <= 1.001 for r in found)
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
    assert len(recommender.similar_items("s04", k=100)) == 39
    for arguments, message in ((("s99",), "'s99' is unknown"), (("s04", 0), "k must be a positive integer")):
        with pytest.raises(DataError, match=message):
            recommender.similar_items(*arguments)


@pytest.mark.parametrize("frame", [pl.DataFrame, pd.DataFrame])
def test_frames_and_columns_are_histories(recommender, frame):
    items = ["s04", "s08"]
    expected = recommender.recommend(items, k=5)
    alone = frame({"item_id": items, "what": [1, 2]})
    for history in (alone, alone["item_id"], frame({"item_id": items, "rating": [1.0, 1.0]})):
        assert recommender.recommend(history, k=5) == expected
    one, two = recommender.batch.recommend([alone, frame({"item_id": ["s03"]})], k=5)
    assert_alike(one, expected)
    assert_alike(two, recommender.recommend(["s03"], k=5))
    with pytest.raises(DataError, match="a table needs the column item_id; it has item"):
        recommender.recommend(frame({"item": items}))
    with pytest.raises(DataError, match=r"every entry an item id; got 1\.5"):
        recommender.recommend(frame({"item_id": [1.5]}))


def test_what_is_no_table_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"mr.data.load\('ml-100k'\)"):
        mr.train("ml-100k")
    with pytest.raises(DataError, match=r"'user_id' is missing .there are: user.; name yours: mr.data.from_tables"):
        mr.train({"user": [1]})


def test_it_says_what_it_is(recommender):
    assert repr(recommender) == f"Recommender(stack, ranking, 40 items, {len(recommender.history)} epochs)"


def test_what_was_seen_long_ago_is_left_out_too(recommender):
    live = recommender.with_users(":memory:")
    items = recommender.catalogue.items.ids.tolist()
    old = [{"user": "ann", "item": item, "kind": "click", "time": 1.0} for item in items[:20]]
    live.update(old + [{"user": "ann", "item": f"new {i}", "kind": "click", "time": 2.0 + i} for i in range(600)])
    assert {r.item for r in live.recommend_to("ann", k=len(items))} == set(items[20:])
