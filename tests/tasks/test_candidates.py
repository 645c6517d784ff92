"""Candidates: what is ranked against a query, drawn the same for everyone who scores it."""

import tracemalloc

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.evaluation.holdout import evaluate, evaluate_scores
from metarec_jax.metrics.scoring import summarise
from metarec_jax.tasks.candidates import candidates, judged_on, most_others


@pytest.fixture(scope="module")
def test_users():
    data = mr.data.synthetic(users=30, items=40, seed=0)
    histories = mr.tasks.Histories.of(data, np.arange(1, 8))
    return histories, mr.tasks.Target("click")


def known(histories, u):
    return set(histories.data.item[histories.index[histories.starts[u] : histories.starts[u + 1]]].tolist())


def test_the_query_alone_is_what_batches_judge(test_users):
    histories, target = test_users
    found = candidates(histories, target, query=5)
    (batch,) = mr.tasks.batches(histories, target, query=5, batch_size=10, buckets=(64,))
    judged = judged_on(batch, histories, found)
    np.testing.assert_array_equal(judged.task.query.target, batch.task.query.target)
    np.testing.assert_array_equal(judged.task.query.mask, batch.task.query.mask)
    real = batch.task.query.mask > 0
    assert judged.task.query.features.keys() == batch.task.query.features.keys()
    for name, value in batch.task.query.features.items():
        np.testing.assert_array_equal(judged.task.query.features[name][real], value[real])


@pytest.mark.parametrize("among", [7, 1000, "all"])
def test_sampled_items_are_new_to_the_user_and_the_same_each_time(test_users, among):
    histories, target = test_users
    found = candidates(histories, target, among, query=5)
    for u in range(len(histories)):
        unseen = found.item[u, 5:][found.mask[u, 5:] > 0]
        missing = len(histories.data.items) - 1 - len(known(histories, u))
        assert len(unseen) == len(set(unseen.tolist())) == (min(among, missing) if among != "all" else missing)
        assert not known(histories, u) & set(unseen.tolist())
        assert 0 not in unseen
        assert not found.target[u, 5:].any()
    again = candidates(histories.take(np.array([3])), target, among, query=5)
    width = int(again.mask.sum())
    np.testing.assert_array_equal(again.item[0, :width], found.item[3, :width])


def test_evaluate_ranks_among_all_items_and_the_baselines_do_too():
    data = mr.data.synthetic(users=60, items=40, seed=0)
    recommender = mr.train(data, strategy="prototypes", objective="click", epochs=2, progress=False, buckets=1)
    scores = evaluate_scores(recommender.trained, candidates="all")
    (own, *baselines) = scores.values()
    assert own.scores.shape[1] > 10
    for other in baselines:
        np.testing.assert_array_equal(other.mask, own.mask)
        np.testing.assert_array_equal(other.target, own.target)
    few, many = (recommender.evaluate(candidates=n)["prototypes"]["ndcg@5"] for n in ("query", "all"))
    assert many < few  # among more items the same clicks are harder to find


@pytest.mark.parametrize("among", [25, "all"])
def test_the_metrics_of_many_candidates_are_those_of_all_users_at_once(monkeypatch, among):
    data = mr.data.synthetic(users=60, items=40, seed=0)
    recommender = mr.train(data, strategy="prototypes", objective="click", epochs=2, progress=False, buckets=1)
    scores = evaluate_scores(recommender.trained, candidates=among)
    expected = {learner: summarise(each, "click") for learner, each in scores.items()}
    test = recommender.split().test
    whole = candidates(test, recommender.target, among, query=10)
    width = most_others(test, recommender.target, among)
    np.testing.assert_array_equal(scores["two means"].mask, whole.mask)
    assert whole.item.shape[1] == 10 + width
    monkeypatch.setattr("metarec_jax.evaluation.holdout.CELLS", 4 * (10 + width))  # four users at a time
    for found in (recommender.evaluate(candidates=among), recommender.evaluate(candidates=among, baselines=False)):
        for learner, row in found.items():
            assert list(row) == list(expected[learner])
            np.testing.assert_allclose(list(row.values()), list(expected[learner].values()), rtol=1e-5)
    in_blocks = evaluate_scores(recommender.trained, candidates=among)
    for learner, each in scores.items():
        np.testing.assert_allclose(in_blocks[learner].scores, each.scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(in_blocks[learner].target, each.target)


def test_evaluating_among_all_items_holds_no_table_of_users_and_items(monkeypatch):
    rng = np.random.default_rng(0)
    rows = {"user_id": np.repeat(np.arange(300), 20), "item_id": rng.permutation(6000)}
    data = mr.data.from_tables(rows | {"rating": rng.integers(1, 6, 6000)})
    protocol, options = mr.ColdUsers(fractions=(0.5, 0.1, 0.4)), {"epochs": 1, "progress": False, "buckets": 1}
    trained = mr.train(data, "prototypes", objective="click", protocol=protocol, **options).trained
    monkeypatch.setattr("metarec_jax.evaluation.holdout.CELLS", 1 << 15)
    monkeypatch.setattr("metarec_jax.metrics.totals.NEGATIVES", 1 << 15)
    monkeypatch.setattr("metarec_jax.metrics.totals.EDGES", 1 << 10)
    peaks = []
    for call in (evaluate, evaluate_scores):
        tracemalloc.start()
        call(trained, candidates="all", baselines=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    table = 120 * 6000 * 4  # bytes of one number for each test user and item
    assert peaks[0] < 3 * table < 5 * table < peaks[1]


def test_what_cannot_be_ranked_is_refused(test_users):
    histories, _ = test_users
    for wrong in (0, True, "some"):
        with pytest.raises(ValueError, match="candidates must be"):
            candidates(histories, mr.tasks.Target("click"), wrong)
    with pytest.raises(ValueError, match="only be ranked against clicks"):
        candidates(histories, mr.tasks.Target("rating"), 5)
