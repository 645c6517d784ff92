"""Sampled negatives: never what a user did, drawn as often as asked, the same for the same seed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.data import from_tables, with_negatives


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(30), 8)
    item = np.concatenate([rng.choice(40, 8, replace=False, p=np.arange(1, 41) / 820) for _ in range(30)])
    table = {"user_id": user, "item_id": item, "rating": np.ones(240), "timestamp": rng.integers(0, 99, 240)}
    return from_tables(table | {"device": rng.choice(["phone", "desk"], 240)}, context=["device"])


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_negatives_are_new_to_their_user_and_carry_their_positives_time_and_context(data, by):
    more = with_negatives(data, 3, by=by, seed=1)
    pairs = Counter(zip(more.user.tolist(), more.item.tolist(), strict=True))
    assert set(pairs.values()) == {1}
    assert more.report["negatives"] == 3 * 240
    negative = more.rating == 0
    assert negative.reshape(240, 4).tolist() == [[False, True, True, True]] * 240  # behind their positive
    for name, values in {"user": more.user, "time": more.timestamp, "device": more.context_features["device"]}.items():
        assert (values.reshape(240, 4) == values.reshape(240, 4)[:, :1]).all(), name
    np.testing.assert_array_equal(more.item[~negative], data.item)


def test_popular_items_are_drawn_in_proportion(data):
    count = np.bincount(data.item, minlength=len(data.items))
    drawn = np.zeros(len(data.items))
    for seed in range(60):
        more = with_negatives(data, by="popularity", seed=seed)
        drawn += np.bincount(more.item[more.rating == 0], minlength=len(data.items))
    # a user's own items are left out: expected draws, user by user, without what is drawn a second time
    expected = np.zeros(len(data.items))
    for user in range(1, 31):
        free = np.where(np.isin(np.arange(len(count)), data.item[data.user == user]), 0, count)
        expected += 8 * 60 * free / free.sum()
    assert np.corrcoef(drawn[1:], expected[1:])[0, 1] > 0.97


def test_the_same_seed_draws_the_same_and_another_does_not(data):
    one, two, other = (with_negatives(data, seed=seed).item for seed in (4, 4, 5))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_a_user_who_knows_nearly_everything_gets_what_is_left():
    table = {"user_id": np.ones(9, int), "item_id": np.arange(9), "rating": np.ones(9)}
    data = from_tables(table, items={"item_id": np.arange(11)})
    more = with_negatives(data, 2)
    assert more.report["negatives"] == 2
    assert sorted(more.item[more.rating == 0].tolist()) == [10, 11]


def test_clicks_alone_can_be_trained_on_with_negatives(data):
    more = with_negatives(data)
    trained = mr.train(
        more, "ridge", protocol=mr.ColdUsers(query=4, threshold=0.5), epochs=2, progress=False, buckets=1
    )
    assert np.isfinite(trained.evaluate()["ridge"]["auc"])


def test_bad_arguments_are_refused(data):
    for options in ({"per_positive": 0}, {"by": "magic"}):
        with pytest.raises(ValueError, match="per_positive"):
            with_negatives(data, **options)
    nothing = {name: getattr(data, name)[:0] for name in ("user", "item", "rating", "timestamp")}
    with pytest.raises(mr.DataError, match="has no interactions"):
        with_negatives(replace(data, **nothing, context_fields=(), context_features={}))
