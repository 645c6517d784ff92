"""Which items to ask a new user about."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.inference.evidence import change, evidence

LOSS = optax.losses.squared_error


@pytest.fixture(scope="module")
def divided():
    """Everyone rates all items; the odd ones everyone rates alike, the even ones users rate by their own sign."""
    data = mr.data.synthetic(users=120, items=20, ratings_per_user=(20, 20), seed=0)
    sign = np.random.default_rng(0).choice([-1, 1], size=len(data.users))
    agreed = np.where(data.item % 4 == 1, 5, 1)
    return replace(data, rating=np.where(data.item % 2 == 1, agreed, 3 + 2 * sign[data.user]).astype(np.float32))


@pytest.fixture(scope="module")
def recommender(divided):
    options = {"objective": "click", "epochs": 12, "progress": False, "buckets": 1}
    return mr.train(divided, "melu", optimizer=optax.adam(0.02), **options)


def test_items_that_tell_users_apart_come_first(recommender, divided):
    asked = recommender.ask(k=10)
    assert {a.item % 2 for a in asked} == {0}
    assert [a.score for a in asked] == sorted((a.score for a in asked), reverse=True)
    assert asked[0].title == divided.titles[divided.items.encode([asked[0].item])[0]]
    assert len(recommender.ask(k=50)) == 20


def test_a_loaded_model_needs_the_data_to_ask(recommender, divided, tmp_path):
    recommender.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    with pytest.raises(mr.DataError, match=r"ask\(k, data\)"):
        loaded.ask()
    assert loaded.ask(3, divided) == recommender.ask(3)
    with pytest.raises(mr.DataError, match="positive integer"):
        recommender.ask(0)


def test_the_value_is_popularity_times_the_mean_norm(recommender, divided):
    train = recommender.split().train
    value = evidence(recommender.strategy, recommender.params, train, recommender.target, users=1000)
    rare = replace(train, index=train.index[(divided.item[train.index] != 2) | (np.arange(len(train.index)) % 2 == 0)])
    less = evidence(recommender.strategy, recommender.params, rare, recommender.target, users=1000)
    share = (divided.item[rare.index] == 2).sum() / (divided.item[train.index] == 2).sum()
    np.testing.assert_allclose(less[2] / value[2], share, rtol=0.1)  # other users, the same mean
    others = np.arange(len(value)) != 2
    np.testing.assert_allclose(less[others], value[others], rtol=1e-5)
    assert value[0] == 0


@pytest.mark.parametrize("form", ["dual", "plain"])
def test_what_an_answer_changes_is_the_step_size_times_the_frobenius_norm_of_the_inner_gradient(
    form, task_batch, tiny_model
):
    support = task_batch(support=1).support
    strategy = mr.maml(tiny_model, inner=optax.sgd(0.1), steps=1, form=form, learn_step_size=False)
    params = strategy.init(jax.random.key(0))
    got = change(strategy, params, support)
    for u in range(5):
        gradient = jax.grad(lambda p, u=u: LOSS(tiny_model.apply(p, support.features[u]), support.target[u]).mean())
        squares = jax.tree.map(lambda g: jnp.square(g).sum(), gradient(params["model"]))
        np.testing.assert_allclose(got[u], 0.1 * np.sqrt(sum(jax.tree.leaves(squares))), rtol=1e-4)


def test_rows_of_a_table_that_are_looked_up_twice_count_once_with_their_sum():
    model = mr.Model(
        lambda key: jnp.arange(12.0).reshape(6, 2) / 10, lambda table, rows: table[rows].sum((-1, -2)), None, None
    )
    features, target = np.array([[[1, 1, 3]], [[2, 4, 5]]]), np.ones((2, 1), np.float32)
    strategy = mr.maml(model, inner=optax.sgd(0.1), steps=1, form="dual", learn_step_size=False)
    params = strategy.init(jax.random.key(0))
    got = change(strategy, params, mr.Examples(features, target, np.ones_like(target)))
    for u in range(2):
        gradient = jax.grad(lambda t, u=u: LOSS(model.apply(t, features[u]), target[u]).mean())(params["model"])
        np.testing.assert_allclose(got[u], 0.1 * np.sqrt(np.square(gradient).sum()), rtol=1e-5)


def test_a_strategy_that_adapts_nothing_is_refused(task_batch, tiny_model):
    reader = mr.maml(tiny_model)
    reads = mr.Strategy(reader.init, lambda params, support, key: ((), support), reader.predict, reader.loss)
    with pytest.raises(ValueError, match="adapts nothing"):
        change(reads, reader.init(jax.random.key(0)), task_batch().support)


def test_copies_in_an_ensemble_move_as_far_as_their_members(tiny_model, task_batch):
    both = mr.ensemble(mr.maml(tiny_model, loss=LOSS, form="dual"), members=2, weights="uniform", loss=LOSS)
    params, support = both.init(jax.random.key(0)), task_batch().support
    each = [
        change(
            mr.maml(tiny_model, loss=LOSS, form="dual"), jax.tree.map(lambda x, m=m: x[m], params["members"]), support
        )
        for m in range(2)
    ]
    np.testing.assert_allclose(change(both, params, support), np.hypot(*each), rtol=1e-5)
