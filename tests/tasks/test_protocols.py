"""Protocols in time and by MeLU's scenarios: nothing of the future, and nothing of a test, is in training."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metarec_jax as mr
from metarec_jax.errors import DataError
from metarec_jax.tasks import Histories, ItemStatistics, Target, batches

QUICK = {"epochs": 2, "progress": False, "buckets": 1}


def timed(seed: int, users: int = 40, items: int = 45) -> mr.data.Dataset:
    """A synthetic dataset whose interactions happen at random moments, some at the same."""
    data = mr.data.synthetic(users=users, items=items, seed=seed)
    rng = np.random.default_rng(seed)
    return replace(data, timestamp=rng.integers(0, 2000, len(data.rating)))


def of_task(histories: Histories, u: int) -> np.ndarray:
    return histories.index[histories.starts[u] : histories.starts[u + 1]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["all", "new"]), st.integers(1, 4))
def test_support_comes_before_query_and_training_before_both_moments(seed, users, query):
    data = timed(seed)
    if users == "new":  # users come in three generations
        begin, length = np.array([0, 1500, 1800]), np.array([1500, 300, 200])
        generation = data.user % 3
        data = replace(data, timestamp=begin[generation] + data.timestamp * length[generation] // 2000)
    protocol = mr.TimeSplit(moments=(1500, 1800), users=users, query=query)
    split = protocol.split(data)
    assert data.timestamp[split.train.index].max() < 1500
    for part, since, until in ((split.validation, 1500, 1800), (split.test, 1800, 10**9)):
        for u in range(len(part)):
            time = data.timestamp[of_task(part, u)]
            assert (np.diff(time) <= 0).all()  # the latest first
            assert (time[:query] >= since).all()
            assert (time < until).all()
            if users == "new":
                assert data.timestamp[data.user == part.users[u]].min() >= since
    rng = np.random.default_rng(seed)
    for batch in batches(split.train, Target("click"), query=query, buckets=(16, 64), rng=rng, batch_size=8):
        order = [(part.features["order"], part.mask > 0) for part in batch.task]
        (support, in_support), (asked, in_query) = order
        for row in range(len(batch.positions)):
            assert support[row][in_support[row]].max() < asked[row][in_query[row]].min()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_what_happens_later_changes_nothing_before(seed):
    data, protocol = timed(seed), mr.TimeSplit(moments=(1500, 1800), query=2)
    rng = np.random.default_rng(seed)
    future = data.timestamp >= 1500
    other = replace(
        data,
        rating=np.where(future, rng.integers(1, 6, len(future)), data.rating).astype(np.float32),
        item=np.where(future, rng.permutation(data.item), data.item),
        timestamp=np.where(future, rng.integers(1500, 2000, len(future)), data.timestamp),
    )
    seen = []
    for version in (data, other):
        try:
            train = protocol.split(version).train
        except DataError:  # the test users may be gone
            return
        target = Target.fit(replace(protocol, target="rating"), train)
        statistics = ItemStatistics.fit(train, target)
        extended = statistics.extend(version)
        made = batches(
            replace(train, data=extended), target, query=2, buckets=(64,), rng=np.random.default_rng(0), unknown=0.1,
            statistics=statistics,
        )  # fmt: skip
        seen.append([batch.task for batch in made])
    for one, two in zip(*seen, strict=True):
        for name, column in one.support.features.items():
            np.testing.assert_array_equal(column, two.support.features[name], err_msg=name)
        np.testing.assert_array_equal(one.query.target, two.query.target)


def test_a_training_task_ends_at_a_moment_of_its_own():
    data = timed(0)
    train = mr.TimeSplit(moments=(1500, 1800), query=2).split(data).train
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(3):
        made = list(batches(train, Target("click"), query=2, buckets=(64,), batch_size=64, rng=rng))
        lengths.add(tuple(sorted(int(n) for batch in made for n in batch.task.support.mask.sum(1))))
    assert len(lengths) == 3


def test_a_task_in_time_keeps_the_latest():
    data = timed(0)
    short = mr.TimeSplit(moments=(1500, 1800), query=2, maximum=5).split(data)
    whole = mr.TimeSplit(moments=(1500, 1800), query=2).split(data)
    for one, two in zip(short, whole, strict=True):
        assert one.users.tolist() == two.users.tolist()
        for u in range(len(one)):
            assert of_task(one, u).tolist() == of_task(two, u)[:5].tolist()


def test_fractions_cut_the_interactions():
    data = timed(0, users=150)
    split = mr.TimeSplit(fractions=(0.7, 0.2, 0.1), query=2, maximum=10_000).split(data)
    assert len(split.train.index) / len(data.rating) == pytest.approx(0.7, abs=0.02)
    moment = np.quantile(data.timestamp, 0.9)
    queries = np.concatenate([of_task(split.test, u)[:2] for u in range(len(split.test))])
    assert data.timestamp[queries].min() >= moment


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["warm", "cold user", "cold item", "cold both"]))
def test_a_scenario_judges_its_own_users_and_items_and_trains_on_neither(seed, kind):
    data = mr.data.synthetic(users=120, items=60, ratings_per_user=(20, 50), seed=seed)
    protocol = mr.Scenario(kind, new=0.4, query=3, minimum=4)
    split = protocol.split(data, seed)
    trained_users, trained_items = (set(x[split.train.index].tolist()) for x in (data.user, data.item))
    for part in (split.validation, split.test):
        users, items = (set(x[part.index].tolist()) for x in (data.user, data.item))
        assert (part.lengths >= 4).all()
        if kind in ("cold user", "cold both"):
            assert not users & trained_users
        if kind in ("cold item", "cold both"):
            assert not items & trained_items
        queries = {i for u in range(len(part)) for i in of_task(part, u)[:3].tolist()}
        assert not queries & set(split.train.index.tolist())
        if kind == "warm":
            assert users <= set(split.train.users.tolist())
    assert not set(split.validation.users.tolist()) & set(split.test.users.tolist())
    again = protocol.split(data, seed)
    assert all(np.array_equal(a.index, b.index) for a, b in zip(split, again, strict=True))


@pytest.mark.parametrize(
    "protocol",
    [
        mr.TimeSplit(moments=(1500, 1800), query=2),
        pytest.param(mr.TimeSplit(query=2, target="rating"), marks=pytest.mark.grid),
        pytest.param(mr.Scenario("warm", query=3, minimum=5), marks=pytest.mark.grid),
        mr.Scenario("cold item", new=0.4, query=3, minimum=5, target="click"),
    ],
    ids=str,
)
def test_a_recommender_trains_is_judged_and_survives_saving(protocol, tmp_path):
    data = timed(0, users=150)
    trained = mr.train(data, "ridge", protocol=protocol, **QUICK)
    results = trained.evaluate()
    assert all(np.isfinite(v) for row in results.values() for name, v in row.items() if name != "within_user_auc")
    trained.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    assert loaded.protocol == protocol
    assert loaded.evaluate(data) == results


def test_bad_protocols_and_data_are_refused():
    for wrong in (
        lambda: mr.TimeSplit(users="old"),
        lambda: mr.TimeSplit(query=0),
        lambda: mr.TimeSplit(fractions=(0.5, 0.5, 0.5)),
        lambda: mr.TimeSplit(moments=(2, 1)),
        lambda: mr.Scenario("hot"),
        lambda: mr.Scenario(new=1.0),
        lambda: mr.Scenario(query=13),
    ):
        with pytest.raises(ValueError, match=r"users is|need|fractions|moments|kind is"):
            wrong()
    data = mr.data.synthetic(users=30, items=45, seed=0)
    with pytest.raises(DataError, match="timestamps"):
        mr.TimeSplit().split(replace(data, timestamp=np.zeros_like(data.timestamp)))
    with pytest.raises(DataError, match="no training user has 30"):
        mr.TimeSplit(query=30, moments=(100, 200)).split(timed(0))
    with pytest.raises(DataError, match="'cold both'"):
        mr.Scenario("cold both", new=0.05).split(data)
