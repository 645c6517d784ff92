"""Plays, purchases and clicks: data without ratings, from the table to recommendations and their evaluation."""

import json

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.strategies.wrappers.stack import of_catalogue


@pytest.fixture(scope="module")
def purchases():
    """Users of two kinds, each buying its own half of the items, the first of each half most often; no ratings."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 21)
    rows = []
    for user in range(100):
        own = np.arange(user % 2, 40, 2)
        rows += [(f"u{user}", f"sku{i}") for i in rng.choice(own, 8, replace=False, p=share / share.sum())]
    users, items = zip(*rows, strict=True)
    return {"user_id": list(users), "item_id": list(items)}


@pytest.fixture(scope="module")
def recommender(purchases):
    return mr.train(mr.data.from_tables(purchases), progress=False)


def test_it_ranks_by_default_and_follows_the_users_kind(recommender):
    assert recommender.target.kind == "ranking"
    for bought in (["sku0", "sku2", "sku8"], ["sku1", "sku3", "sku9"]):
        top = recommender.recommend(bought, k=5)
        assert not {r.item for r in top} & set(bought)
        assert sum(int(r.item[3:]) % 2 == int(bought[0][3:]) % 2 for r in top) >= 4
    several = recommender.batch.recommend([["sku0", "sku2", "sku8"], ["sku1"], []], k=5)
    assert [len(found) for found in several] == [5, 5, 5]
    assert [r.item for r in several[0]] == [r.item for r in recommender.recommend(["sku0", "sku2", "sku8"], k=5)]


def test_ids_alone_a_rating_of_one_and_a_purchase_mean_the_same(recommender):
    expected = [r.item for r in recommender.recommend(["sku0", "sku2"], k=5)]
    assert [r.item for r in recommender.recommend({"sku0": 1.0, "sku2": 1.0}, k=5)] == expected
    live = recommender.with_users(":memory:")
    live.update([{"user": "ann", "item": item, "kind": "purchase"} for item in ("sku0", "sku2")])
    assert [r.item for r in live.recommend_to("ann", k=5)] == expected


def test_who_did_nothing_gets_what_is_popular(recommender, purchases):
    items, counts = np.unique(purchases["item_id"], return_counts=True)
    bought = dict(zip(items.tolist(), counts.tolist(), strict=True))
    first = [bought.get(r.item, 0) for r in recommender.recommend([], k=8)]
    assert min(first) >= 0.8 * np.sort(counts)[-8]


def test_it_is_evaluated_beside_the_plain_methods(recommender):
    results = recommender.evaluate()
    assert {"stack", "popularity"} < set(results)
    assert all(np.isfinite(value) for table in results.values() for value in table.values())
    assert results["stack"]["ndcg@100"] > results["popularity"]["ndcg@100"]


def test_it_says_why_and_is_the_same_after_saving(recommender, tmp_path):
    why = recommender.explain(["sku0", "sku2"], "sku4")
    assert {cause.item for cause in why.causes} == {"sku0", "sku2"}
    recommender.save(tmp_path / "model")
    again = mr.load(tmp_path / "model")
    assert again.recommend(["sku0", "sku2"], k=5) == recommender.recommend(["sku0", "sku2"], k=5)


@pytest.mark.parametrize("told", [True, False])
def test_a_saved_stack_keeps_its_members_when_the_defaults_change(recommender, tmp_path, monkeypatch, told):
    recommender.save(tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    config = json.loads(path.read_text())
    assert config["recipe"]["strategy"]["options"]["members"] == ["ials", "ease", "content"]
    if not told:  # as it was saved before the members were kept, and novelty was there
        config["recipe"]["strategy"]["options"] = {}
        path.write_text(json.dumps(config))
    for bound in ("SMALL", "DENSE") if told else ("SMALL",):
        monkeypatch.setitem(of_catalogue.__globals__, bound, 1)
    again = mr.load(tmp_path / "model")
    if told:
        assert again.recommend(["sku0", "sku2"], k=5) == recommender.recommend(["sku0", "sku2"], k=5)
    assert (again.strategy.novelty, len(again.params["weights"])) == (0.15 if told else 0.0, 3)
