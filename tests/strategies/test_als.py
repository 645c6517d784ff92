"""ALS with fold-in: numpy in float64, the plain baseline, tastes that are known, and its own uncertainty."""

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.evaluation.baselines import Interactions, als_fold_in
from metarec_jax.metrics.scoring import score_tasks
from metarec_jax.strategies.als import population
from metarec_jax.tasks.batching import batches, features
from metarec_jax.tasks.observed import observe
from metarec_jax.training.loop import fit

KEY, RANK = jax.random.key(0), 3
PROTOCOL = mr.ColdUsers(target="rating")
DATA = mr.data.synthetic(users=150, items=40, noise=0.3, seed=1)


@cache
def fitted(**options):
    """Strategy, parameters, split and target."""
    split = PROTOCOL.split(DATA)
    target = mr.tasks.Target.fit(PROTOCOL, split.train)
    strategy = mr.als(mr.models.design(mr.models.fields_of(DATA)), rank=RANK, sweeps=4, **options)
    params = {**strategy.init(KEY), "tables": {"fitted": strategy.fit(observe(split.train, target))}}
    return strategy, params, split, target


def examples(rows, target=None, weight=None):
    rows = np.atleast_2d(rows)
    target = np.zeros(rows.shape, np.float32) if target is None else np.asarray(target, np.float32)
    weight = np.ones(rows.shape, np.float32) if weight is None else np.asarray(weight, np.float32)
    return mr.Examples(features(DATA, np.zeros(len(rows), int), rows), target, weight)


@pytest.mark.parametrize("prior", ["ridge", "population"])
def test_a_users_bias_and_vector_are_the_closed_form_in_float64(prior):
    strategy, params, *_ = fitted(penalty=2.0, shrink=3.0, prior=prior)
    rng = np.random.default_rng(0)
    rows, target = rng.integers(1, 41, (4, 9)), rng.normal(size=(4, 9))
    weight = rng.uniform(0.2, 2, (4, 9)) * (rng.random((4, 9)) < 0.7)
    weight[3] = 0  # nothing is known
    found = strategy.adapt(params, examples(rows, target, weight), KEY)
    table = params["tables"]["fitted"]
    mean, items = float(table["mean"]), table["items"].astype(float)
    for u in range(4):
        v, rest, w = items[rows[u], 1:], target[u] - mean - items[rows[u], 0], weight[u]
        if prior == "ridge":
            bias = (w * rest).sum() / (w.sum() + 3)
            vector = np.linalg.solve((v.T * w) @ v + 2 * np.eye(RANK), (v.T * w) @ (rest - bias))
        else:
            z = np.insert(v, 0, 1, axis=1)
            bias, *vector = np.linalg.solve((z.T * w) @ z + table["precision"], (z.T * w) @ rest)
        np.testing.assert_allclose(found.value[u, 0], bias, atol=1e-5)
        np.testing.assert_allclose(found.value[u, 1:], vector, atol=1e-5)
        asked = np.arange(1, 41)
        scores = strategy.predict(params, found, examples(np.tile(asked, (4, 1))).features)[u]
        np.testing.assert_allclose(scores, mean + bias + items[asked, 0] + items[asked, 1:] @ vector, atol=1e-5)


def test_predictions_equal_those_of_the_plain_baseline():
    strategy, params, split, target = fitted(penalty=5.0, prior="ridge")
    index = split.train.index
    train = Interactions(DATA.user[index], DATA.item[index], target.encode(DATA.rating[index]).astype(float), 41)
    assert (np.bincount(train.item, minlength=41)[1:] > 0).all()
    plain = als_fold_in(train, rank=RANK, ridge=5.0, sweeps=4)
    (batch,) = batches(split.test, target, query=10, batch_size=len(split.test), buckets=(32,))
    support, query = batch.task
    adapted = jax.jit(strategy.adapt)(params, support, KEY)
    found = np.asarray(strategy.predict(params, adapted, query.features))
    for u in range(len(split.test)):
        known, asked = support.mask[u] > 0, query.mask[u] > 0
        rows = (e.features["item_id"][u] for e in batch.task)
        expected = plain(next(rows)[known], support.target[u, known].astype(float), next(rows)[asked])
        np.testing.assert_allclose(found[u, asked], expected, atol=1e-4)


def test_scores_from_the_item_side_are_those_of_predict_and_padding_changes_nothing():
    strategy, params, *_ = fitted()
    rows, target = np.array([[3, 5, 7], [1, 2, 9]]), np.array([[1.0, -1, 0.5], [0, 2, 1]])
    adapted = strategy.adapt(params, examples(rows, target), KEY)
    everything = examples(np.tile(np.arange(41), (2, 1))).features
    scores = strategy.predict(params, adapted, everything)
    side = strategy.items(params, {name: value[0] for name, value in everything.items()})
    np.testing.assert_allclose(strategy.score(params, adapted, side), scores, rtol=1e-5, atol=1e-6)
    wider = examples(np.pad(rows, ((0, 0), (0, 4))))
    mask = np.pad(np.ones((2, 3), np.float32), ((0, 0), (0, 4)))
    for nothing in (0.0, np.nan):
        padded = wider._replace(target=np.pad(target, ((0, 0), (0, 4)), constant_values=nothing), mask=mask)
        again = strategy.predict(params, strategy.adapt(params, padded, KEY), everything)
        np.testing.assert_allclose(again, scores, atol=1e-5)


def test_new_items_are_predicted_from_their_fields():
    """The taste of synthetic items comes from their genre: of held-out items it tells much of the rating."""
    rng = np.random.default_rng(0)
    data = mr.data.synthetic(users=300, items=80, noise=0.2, ratings_per_user=(30, 50), seed=2)
    hidden = rng.permutation(np.arange(1, 81))[:16]
    kept = ~np.isin(data.item, hidden)
    part = mr.tasks.Histories.of(data, np.arange(1, 301), kept)
    target = mr.tasks.Target("rating", mean=3.5)
    strategy = mr.als(mr.models.design(mr.models.fields_of(data)))
    params = {"tables": {"fitted": strategy.fit(observe(part, target))}}
    (batch,) = batches(part, target, query=1, batch_size=300, buckets=(48,))
    adapted = jax.jit(strategy.adapt)(params, batch.task.support, KEY)
    as_rows, as_new = (features(data, np.zeros(300, int), np.tile(hidden, (300, 1))) for _ in range(2))
    as_new["item_id"] = np.zeros_like(as_new["item_id"])
    found = [np.asarray(strategy.predict(params, adapted, x)) for x in (as_rows, as_new)]
    np.testing.assert_allclose(*found, atol=1e-5)  # an item of the catalogue that nobody rated is new as well
    truth = data.truth[part.users[batch.positions]][:, hidden] - 3.5
    plain = truth - truth.mean(1, keepdims=True)
    assert np.square(found[0] - truth).mean() < 0.5 * np.square(plain).mean()


def test_its_deviation_is_how_far_ratings_are_from_the_predicted_ones():
    data = mr.data.synthetic(users=400, items=60, noise=0.4, seed=5)
    recommender = mr.train(data, "als", objective="rating", progress=False)
    split, target, strategy = recommender.split(), recommender.target, recommender.strategy
    for support in (3, None):
        (batch,) = batches(split.test, target, query=10, support=support, batch_size=len(split.test), buckets=(32,))
        adapted = strategy.adapt(recommender.params, batch.task.support, KEY)
        mean, deviation = (
            np.asarray(f(recommender.params, adapted, batch.task.query.features))
            for f in (strategy.predict, strategy.deviation)
        )
        z = (batch.task.query.target - mean) / deviation
        assert 0.8 < z.std() < 1.2
        assert 0.84 < (np.abs(z) < 1.645).mean() < 0.95


def test_population_finds_the_covariance_and_the_noise_that_data_were_drawn_with():
    rng = np.random.default_rng(0)
    root = np.array([[0.8, 0, 0], [0.3, 0.5, 0], [0, -0.4, 0.9]])
    user = np.repeat(np.arange(2000), 12)
    z, taste = rng.normal(size=(len(user), 3)), rng.normal(size=(2000, 3)) @ root.T
    covariance, noise = population(user, z, (z * taste[user]).sum(1) + 0.7 * rng.normal(size=len(user)), steps=60)
    np.testing.assert_allclose(covariance, root @ root.T, atol=0.06)
    assert noise == pytest.approx(0.49, rel=0.03)


def test_the_population_predicts_better_than_a_ridge():
    error = {}
    for prior in ("population", "ridge"):
        strategy, params, split, target = fitted(prior=prior)
        for size in (3, None):
            tasks = batches(split.test, target, query=10, support=size, batch_size=len(split.test), buckets=(32,))
            scores = score_tasks(strategy, params, tasks, target)
            error[prior, size] = np.sqrt(np.square(scores.scores - scores.target)[scores.mask > 0].mean())
    assert error["population", 3] < error["ridge", 3]
    assert error["population", None] < error["ridge", None]


def test_ratings_that_weigh_twice_count_twice():
    strategy, params, *_ = fitted()
    once = strategy.adapt(params, examples([[4, 8]], [[1.0, -0.5]], [[2.0, 1.0]]), KEY)
    twice = strategy.adapt(params, examples([[4, 8, 4]], [[1.0, -0.5, 1.0]]), KEY)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), once, twice)


def test_training_ends_with_the_fit_and_penalties_are_learned_when_asked_for():
    at_once = mr.train(DATA, "als", objective="rating", progress=True)
    assert at_once.history == []
    assert [*at_once.params] == ["tables"]
    again = mr.train(DATA, "als", objective="rating", progress=False)
    jax.tree.map(np.testing.assert_array_equal, at_once.params, again.params)
    strategy, _, split, target = fitted(learn=True)
    learned = fit(strategy, split, target, epochs=2, optimizer=optax.adam(0.1), buckets=1)
    assert len(learned.history) == 2
    assert all(np.isfinite(entry["rmse"]) for entry in learned.history)
    assert abs(learned.params["penalty"]) > 1e-3
    nothing = fit(strategy, split, target, epochs=0)
    assert nothing.history == []
    assert nothing.params["penalty"] == 0
    np.testing.assert_array_equal(
        nothing.params["tables"]["fitted"]["items"], learned.params["tables"]["fitted"]["items"]
    )


def test_saved_and_loaded_it_evaluates_the_same(tmp_path):
    recommender = mr.train(DATA, "als", objective="rating", progress=False)
    recommender.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    assert loaded.evaluate(DATA, baselines=False) == recommender.evaluate(baselines=False)
    results = recommender.evaluate()
    assert results["als"]["rmse"] < 0.85 * results["two means"]["rmse"]
    best = recommender.recommend({1: 5.0, 2: 1.0}, k=5, deviation=True)
    assert all(r.deviation > 0 for r in best)


def test_what_it_cannot_do_is_refused():
    model = mr.models.design(mr.models.fields_of(DATA))
    for objective in ("click", "ranking"):
        with pytest.raises(ValueError, match='objective="rating"'):
            mr.train(DATA, "als", objective=objective, progress=False)
    with pytest.raises(ValueError, match='model="design"'):
        mr.als(mr.models.linear(mr.models.fields_of(DATA)))
    with pytest.raises(ValueError, match="prior is"):
        mr.als(model, prior="luck")
    for options in ({"rank": 0}, {"penalty": 0.0}, {"shrink": -1.0}, {"sweeps": 0}):
        with pytest.raises(ValueError, match="positive numbers"):
            mr.als(model, **options)
    with pytest.raises(ValueError, match="a strategy that ranks cannot predict a rating"):
        mr.train(DATA, "ials", objective="rating", progress=False)


def test_one_rating_of_one_user_is_enough():
    one = replace(DATA, user=DATA.user[:1], item=DATA.item[:1], rating=DATA.rating[:1], timestamp=DATA.timestamp[:1])
    histories = mr.tasks.Histories.of(one, DATA.user[:1])
    strategy = mr.als(mr.models.design(mr.models.fields_of(one)))
    table = strategy.fit(observe(histories, mr.tasks.Target("rating")))
    assert all(np.isfinite(x).all() for x in table.values())
