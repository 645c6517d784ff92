"""Scoring: learners and baselines are judged on the same interactions, and padding reaches no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.data.simulation import synthetic
from metarec_jax.data.tables import from_tables
from metarec_jax.evaluation.baselines import BASELINES, OF_RATINGS, score_baselines
from metarec_jax.metrics import pointwise as metrics
from metarec_jax.metrics.scoring import Scores, score_tasks, summarise
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.batching import batches
from metarec_jax.tasks.splits import ColdUsers, Histories
from metarec_jax.tasks.target import Target

DATA = synthetic(users=90, items=60, ratings_per_user=(11, 40), seed=2)
PROTOCOLS = {kind: ColdUsers(minimum=11, maximum=40, target=kind, threshold=3.5) for kind in ("click", "rating")}


def user_mean() -> Strategy:
    """Scores an item by the mean of the user's support targets plus a tenth of its row."""

    def adapt(params, support, key):
        return (support.target * support.mask).sum(1) / support.mask.sum(1).clip(1)

    def predict(params, adapted, features):
        return params * (adapted[:, None] + features["item_id"] / 10)

    return Strategy(lambda key: jnp.ones(()), adapt, predict, lambda *_: (jnp.zeros(()), {}))


@pytest.fixture(scope="module", params=["click", "rating"])
def setting(request):
    protocol = PROTOCOLS[request.param]
    split = protocol.split(DATA, 1)
    return split, Target.fit(protocol, split.train)


def plain_scores(test: Histories, target: Target, query: int, support: int | None) -> list[list[float]]:
    found = []
    for i in range(len(test)):
        own = test.index[test.starts[i] : test.starts[i + 1]]
        judged, seen = own[:query], own[query:][:support]
        mean = float(np.mean(target.grade(DATA.rating[seen]))) if len(seen) else 0.0
        raw = [mean + int(item) / 10 for item in DATA.item[judged]]
        found.append([1 / (1 + np.exp(-r)) if target.kind == "click" else r * target.scale + target.mean for r in raw])
    return found


@pytest.mark.parametrize("support", [None, 3])
@pytest.mark.parametrize(("size", "buckets"), [(4, (8, 16, 32)), (64, (32,))])
def test_scores_equal_a_plain_loop_whatever_the_batches(setting, support, size, buckets):
    split, target = setting
    made = batches(split.test, target, query=10, support=support, batch_size=size, buckets=buckets)
    found = score_tasks(user_mean(), jnp.ones(()), made, target)
    assert (found.mask == 1).all()
    np.testing.assert_allclose(found.scores, plain_scores(split.test, target, 10, support), rtol=1e-5)
    wanted = [DATA.rating[split.test.index[a : a + 10]] for a in split.test.starts[:-1]]
    if target.kind == "click":
        np.testing.assert_array_equal(found.target, np.array(wanted) >= 3.5)
    else:
        np.testing.assert_allclose(found.target, wanted, rtol=1e-5)


@pytest.mark.parametrize("support", [None, 3, 0])
def test_baselines_are_judged_on_the_same_queries_as_learners(setting, support):
    split, target = setting
    made = batches(split.test, target, query=10, support=support, batch_size=4, buckets=(8, 16, 32))
    learner = score_tasks(user_mean(), jnp.ones(()), made, target)
    results = score_baselines(split.train, split.test, target, query=10, support=support)
    of_ratings = {name for name in BASELINES if name.endswith(OF_RATINGS)}
    assert set(results) == set(BASELINES) - (of_ratings if target.kind == "rating" else set())
    for scores in results.values():
        np.testing.assert_array_equal(scores.mask, learner.mask)
        np.testing.assert_allclose(scores.target, learner.target, rtol=1e-6)


@pytest.mark.parametrize("support", [None, 3])
def test_baselines_see_the_training_users_and_the_support_only(setting, support, monkeypatch):
    split, target = setting
    seen = []

    def spy(train):
        seen.append(set(zip(train.user.tolist(), train.item.tolist(), strict=True)))

        def predict(items, values, query):
            seen.append((items.tolist(), values.tolist(), query.tolist()))
            return np.zeros(len(query))

        return predict

    monkeypatch.setattr("metarec_jax.evaluation.baselines.BASELINES", {"spy": spy})
    score_baselines(split.train, split.test, target, query=10, support=support)
    trained, *tasks = seen
    users = set(split.train.users.tolist())
    assert trained == {(u, i) for u, i in zip(DATA.user.tolist(), DATA.item.tolist(), strict=True) if u in users}
    (batch,) = batches(split.test, target, query=10, support=support, batch_size=len(split.test), buckets=(40,))
    for row, (items, values, query) in enumerate(tasks):
        kept = batch.task.support.mask[row] > 0
        assert items == batch.task.support.features["item_id"][row][kept].tolist()
        known = {i: r for u, i, r in zip(DATA.user, DATA.item, DATA.rating, strict=True) if u == split.test.users[row]}
        np.testing.assert_allclose(values, target.encode(np.array([known[i] for i in items], float)), rtol=1e-6)
        assert query == batch.task.query.features["item_id"][row].tolist()


def test_baseline_clicks_are_probabilities_and_ratings_are_in_stars():
    for kind, protocol in PROTOCOLS.items():
        split = protocol.split(DATA)
        for scores in score_baselines(split.train, split.test, Target.fit(protocol, split.train)).values():
            if kind == "click":
                assert scores.scores.min() >= 0
                assert scores.scores.max() <= 1
                assert set(np.unique(scores.target)) == {0, 1}
            else:
                assert abs(scores.scores.mean() - DATA.rating.mean()) < 0.5
                assert abs(scores.target.mean() - DATA.rating.mean()) < 0.5


def test_users_with_fewer_ratings_than_the_query_are_masked_alike():
    user = np.repeat(np.arange(1, 21), 2 + np.arange(20) % 6)
    item = np.concatenate([np.arange(n) for n in 2 + np.arange(20) % 6]) + 1
    data = from_tables({"user_id": user, "item_id": item, "rating": (user + item) % 5})
    train, test = Histories.of(data, np.arange(1, 13)), Histories.of(data, np.arange(13, 21))
    target = Target("rating", mean=2.0)
    learner = score_tasks(
        user_mean(), jnp.ones(()), batches(test, target, query=4, batch_size=3, buckets=(2, 8)), target
    )
    assert learner.mask.sum(1).tolist() == np.minimum(test.lengths - 1, 4).tolist()
    for scores in score_baselines(train, test, target, query=4).values():
        np.testing.assert_array_equal(scores.mask, learner.mask)
        kept = scores.mask > 0
        np.testing.assert_allclose(scores.target[kept], learner.target[kept])
        assert np.isfinite(scores.scores).all()


def test_one_compilation_for_each_bucket_shape():
    split = PROTOCOLS["click"].split(DATA)
    target = Target("click", 3.5)
    traces = []
    base = user_mean()

    def predict(params, adapted, features):
        traces.append(features["item_id"].shape)
        return base.predict(params, adapted, features)

    def adapt(params, support, key):
        traces.append(support.mask.shape)
        return base.adapt(params, support, key)

    strategy = base._replace(adapt=adapt, predict=predict)
    for _ in range(2):
        score_tasks(strategy, jnp.ones(()), batches(split.train, target, batch_size=8, buckets=(8, 16, 32)), target)
    assert sorted(traces) == sorted([(8, 10)] * 3 + [(8, 8), (8, 16), (8, 32)])


@pytest.mark.parametrize("kind", ["click", "rating"])
def test_a_summary_holds_plain_floats_of_the_right_table(kind):
    rng = np.random.default_rng(0)
    scores = Scores(rng.random((5, 4)), (rng.random((5, 4)) < 0.5) * 1.0, np.ones((5, 4)))
    found = summarise(scores, kind)
    table = metrics.click_metrics if kind == "click" else metrics.rating_metrics
    assert all(type(value) is float for value in found.values())
    np.testing.assert_allclose(list(found.values()), jax.tree.leaves([table(*scores)[name] for name in found]))
