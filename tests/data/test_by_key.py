"""Tasks by any key: a plain loop finds the same groups, and whole runs on them work."""

from dataclasses import replace

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.data import by_key, from_tables
from metarec_jax.errors import DataError
from metarec_jax.tasks import ItemStatistics, Target, batches


@pytest.fixture(scope="module")
def data():
    source = mr.data.synthetic(users=60, items=80, ratings_per_user=(30, 40), seed=1)
    rng = np.random.default_rng(0)
    interactions = {
        "user_id": source.user, "item_id": source.item, "rating": source.rating, "timestamp": source.timestamp,
        "device": np.where(rng.random(len(source.user)) < 0.05, None, rng.choice(["phone", "tv"], len(source.user))),
    }  # fmt: skip
    items = {"item_id": np.arange(1, 81), "merchant": [f"m{i % 40}" for i in range(80)], "price": rng.random(80)}
    users = {"user_id": np.arange(1, 61), "country": rng.choice(["nl", "de"], 60)}
    return from_tables(interactions, users, items, context=["device"])


def raw(data, name: str, source: str, rows: np.ndarray) -> np.ndarray:
    """Raw values of a categorical field, "" where unknown."""
    field = next(f for f in getattr(data, f"{source}_fields") if f.name == name)
    return np.concatenate([[""], field.vocabulary.ids])[getattr(data, f"{source}_features")[name][rows]]


def test_a_task_of_a_user_and_a_context_holds_that_users_interactions_in_it(data):
    found = by_key(data, "user", "context/device")
    device = raw(data, "device", "context", np.arange(len(data.user)))
    wanted = {}
    for u, d, i, r in zip(data.users.decode(data.user), device, data.item, data.rating, strict=True):
        if d:
            wanted.setdefault(f"{u}/{d}", []).append((i, r))
    assert set(found.users.ids) == set(wanted)
    for row, name in enumerate(found.users.ids, 1):
        own = found.user == row
        assert list(zip(found.item[own], found.rating[own], strict=True)) == wanted[name]
        user = data.users.encode([int(name.split("/")[0])])
        assert found.user_features["country"][row] == data.user_features["country"][user][0]
    assert found.report["without a key"] == (device == "").sum() > 0
    assert set(mr.models.fields_of(found)) == {"item_id", "user/country", "item/merchant", "item/price"}


def test_a_task_of_many_users_reads_their_attributes_as_contexts(data):
    found = by_key(data, "item/merchant")
    np.testing.assert_array_equal(found.users.decode(found.user), raw(data, "merchant", "item", data.item))
    np.testing.assert_array_equal(found.context_features["user/country"], data.user_features["country"][data.user])
    assert set(mr.models.fields_of(found)) == {"item_id", "item/price", "context/device", "context/user/country"}


def test_raw_values_are_a_key_and_users_by_themselves_change_nothing(data):
    again = by_key(data, "user")
    for name in ("user", "item", "rating", "timestamp", "order"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    hour = data.timestamp // 3600 % 24
    found = by_key(data, hour)
    np.testing.assert_array_equal(found.users.decode(found.user), hour)


def test_statistics_leave_out_all_that_a_task_did_with_an_item(data):
    found = by_key(data, "user/country")
    histories = mr.tasks.Histories.of(found, np.array([1, 2]))
    target = Target("rating")
    statistics = ItemStatistics.fit(histories, target)
    (batch,) = batches(
        replace(histories, data=statistics.extend(found)), target, query=5, batch_size=2, buckets=(2000,),
        statistics=statistics,
    )  # fmt: skip
    mean, field = found.rating.astype(float).mean(), statistics.field
    for part in batch.task:
        got = part.features["item/training statistics"] * field.scale + field.mean
        for row, task in enumerate(histories.users[batch.positions]):
            for place in np.flatnonzero(part.mask[row])[:30]:
                others = (found.user != task) & (found.item == part.features["item_id"][row, place])
                total = (found.rating[others].astype(float) - mean).sum()
                wanted = [total / (others.sum() + 5), np.log1p(others.sum())]
                np.testing.assert_allclose(got[row, place], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "protocol"),
    [
        pytest.param(("item/merchant",), mr.ColdUsers(query=4, minimum=8, target="rating"), marks=pytest.mark.grid),
        (("user", "context/device"), mr.ColdUsers(query=4, minimum=8)),
        (("user", "context/device"), mr.TimeSplit(query=2)),
    ],
    ids=str,
)
def test_a_recommender_trains_is_judged_and_survives_saving(data, keys, protocol, tmp_path):
    found = by_key(data, *keys)
    trained = mr.train(found, "ridge", protocol=protocol, epochs=2, progress=False, buckets=1)
    results = trained.evaluate(baselines=False)
    assert all(np.isfinite(v) for row in results.values() for name, v in row.items() if name != "within_user_auc")
    trained.save(tmp_path / "model")
    assert mr.load(tmp_path / "model").evaluate(by_key(data, *keys), baselines=False) == results


def test_bad_keys_are_refused(data):
    with pytest.raises(ValueError, match="needs a key"):
        by_key(data)
    for key, message in (("item/price", "no categorical"), ("item/x", "item/merchant"), ("x", "no categorical")):
        with pytest.raises(DataError, match=message):
            by_key(data, key)
    with pytest.raises(DataError, match="3 values"):
        by_key(data, np.arange(3))
    left = np.where(data.user == 1, "a/b", "a")
    with pytest.raises(DataError, match="read alike"):
        by_key(data, left, np.where(data.user == 1, "c", "b/c"))
