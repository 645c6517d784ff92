"""Ensembles: what reaches a member's training, and how the members' scores become one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

import metarec_jax as mr
from metarec_jax.tasks.batching import batches

LOGISTIC = optax.losses.sigmoid_binary_cross_entropy
KEY = jax.random.key(0)


@pytest.fixture
def different(tiny_model):
    return [mr.ridge(tiny_model, loss=LOGISTIC), mr.anil(tiny_model, loss=LOGISTIC, steps=2)]


def everything(strategy, task):
    """Loss, gradient and query scores at some parameters, as a function."""

    def run(params):
        value, gradient = jax.value_and_grad(lambda p: strategy.loss(p, task, KEY)[0])(params)
        adapted = strategy.adapt(params, task.support, KEY)
        return value, gradient, strategy.predict(params, adapted, task.query.features)

    return jax.jit(run)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_copies_are_trained_as_if_alone_and_their_scores_averaged(task_batch, tiny_model):
    task, member = task_batch(), mr.maml(tiny_model, steps=2)
    both = mr.ensemble(member, members=2)
    params, alone = both.init(KEY), everything(member, task)
    value, gradient, scores = everything(both, task)(params)
    members = [alone(jax.tree.map(lambda x: x[m], params["members"])) for m in range(2)]
    assert_close(value, np.mean([m[0] for m in members]))
    assert_close(scores, np.mean([m[2] for m in members], axis=0))
    for i, (_, own, _) in enumerate(members):
        assert_close(jax.tree.map(lambda g: g[i], gradient["members"]), own)


@pytest.mark.parametrize("weights", ["uniform", "validation", "gate"])
def test_different_members_are_trained_as_if_alone_however_they_are_weighted(different, task_batch, weights):
    task, both = task_batch(), mr.ensemble(different, weights=weights, loss=LOGISTIC)
    params = both.init(KEY)
    value, gradient, scores = everything(both, task)(params)
    members = [everything(s, task)(p) for s, p in zip(different, params["members"], strict=True)]
    assert_close(gradient["members"], [own for _, own, _ in members])
    assert_close(scores, np.mean([s for _, _, s in members], axis=0))  # all weights are equal at first
    if weights == "gate":
        assert any(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(gradient["weights"]))
        assert_close(value, mr.core.query_loss(scores, task.query, LOGISTIC))
    else:
        assert_close(value, np.mean([v for v, _, _ in members]))
        assert not any(np.any(g) for g in jax.tree.leaves(gradient["weights"]))


def test_the_gate_is_a_network_of_what_the_support_set_says(different, task_batch):
    task, both = task_batch(), mr.ensemble(different, weights="gate", loss=LOGISTIC)
    params = both.init(KEY)
    out = jax.random.normal(KEY, params["weights"]["out"].shape)
    params["weights"] = {**params["weights"], "out": out, "bias": jnp.array([0.3, -0.2])}
    adapted = both.adapt(params, task.support, KEY)
    net = jax.tree.map(np.asarray, params["weights"])
    each = [
        (s.predict(p, s.adapt(p, task.support, KEY), task.support.features), s)
        for s, p in zip(different, params["members"], strict=True)
    ]
    for u in range(5):
        n = int(task.support.mask[u].sum())
        y = task.support.target[u, :n]
        losses = [float(np.mean(LOGISTIC(np.asarray(scores)[u, :n], y))) for scores, _ in each]
        inputs = np.array([np.log(1 + n), y.mean(), y.var(), *losses])
        logits = np.tanh(inputs @ net["layer"] + net["shift"]) @ net["out"] + net["bias"]
        np.testing.assert_allclose(adapted["gate"][u], np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)
    members = np.stack(
        [
            s.predict(p, a, task.query.features)
            for s, p, a in zip(different, params["members"], adapted["members"], strict=True)
        ]
    )
    expected = np.einsum("mun,um->un", members, adapted["gate"])
    assert_close(both.predict(params, adapted, task.query.features), expected)


def test_fitted_weights_are_the_best_convex_combination(different, task_batch):
    three = [*different, mr.ridge(different_model(), loss=LOGISTIC, penalty=0.1)]
    both = mr.ensemble(three, weights="validation")
    tasks = [task_batch(seed=s) for s in (1, 2)]
    params = both.init(KEY)
    fitted = mr.fit_weights(both, params, tasks, loss=LOGISTIC)
    assert_close(fitted["members"], params["members"])

    scores, queries = [], []
    for task in tasks:
        adapted = both.adapt(params, task.support, KEY)["members"]
        zipped = zip(three, params["members"], adapted, strict=True)
        scores.append(np.stack([s.predict(p, a, task.query.features) for s, p, a in zipped], -1).astype(float))
        queries.append(task.query)

    def objective(w):
        per_user = [
            np.mean((np.logaddexp(0, s[u] @ w) - q.target[u] * (s[u] @ w))[q.mask[u] > 0])
            for s, q in zip(scores, queries, strict=True)
            for u in range(5)
        ]
        return np.mean(per_user)

    simplex = {"constraints": {"type": "eq", "fun": lambda w: w.sum() - 1}, "bounds": [(0, 1)] * 3}
    best = minimize(objective, np.full(3, 1 / 3), method="SLSQP", **simplex)
    found = np.asarray(jax.nn.softmax(fitted["weights"]))
    assert objective(found) <= best.fun + 5e-4 < objective(np.full(3, 1 / 3))
    np.testing.assert_allclose(found, best.x, atol=0.05)


def different_model():
    """A model that reads the features as they are."""

    def score(params, x):
        return x @ params["w"] + params["b"]

    return mr.Model(lambda key: {"w": jnp.zeros(3), "b": jnp.zeros(())}, score, embed=lambda params, x: x, width=3)


def test_weights_are_fitted_after_training_as_the_docstring_says(synthetic):
    def strategy(model, *, loss):
        return mr.ensemble([mr.ridge(model, loss=loss), mr.anil(model, loss=loss)], weights="validation")

    found = mr.train(synthetic, strategy, "linear", objective="click", epochs=2, progress=False, buckets=1)
    np.testing.assert_array_equal(found.params["weights"], 0)  # training leaves them alone
    users = found.split().validation
    tasks = [batch.task for batch in batches(users, found.target, buckets=(32,))]
    params = mr.fit_weights(found.strategy, found.params, tasks, loss=LOGISTIC)
    better = mr.Recommender(replace(found.trained, params=params))
    assert np.ptp(better.params["weights"]) > 0.01
    assert np.isfinite(better.evaluate(baselines=False)["strategy"]["auc"])


def test_given_members_answer_as_they_are_and_are_not_trained(different, task_batch):
    task, (ridge, anil) = task_batch(), different
    trained = ridge.init(jax.random.key(1))
    both = mr.ensemble([mr.given(ridge, trained), anil], weights="gate", loss=LOGISTIC)
    params = both.init(KEY)
    assert params["members"][0] == {}
    _, gradient, scores = everything(both, task)(params)
    one, two = everything(ridge, task)(trained)[2], everything(anil, task)(params["members"][1])
    assert_close(scores, (one + two[2]) / 2)
    assert_close(gradient["members"][1], two[1])


def test_the_deviation_is_that_of_the_mixture_and_known_only_where_every_member_knows_its_own(different, task_batch):
    def knowing(strategy, own):
        return strategy._replace(deviation=lambda p, a, x: jnp.full(x.shape[:2], own))

    task, (ridge, anil) = task_batch(), different
    both = mr.ensemble([knowing(ridge, 0.5), mr.given(knowing(anil, 2.0), anil.init(KEY))], weights="validation")
    params = {**both.init(KEY), "weights": jnp.log(jnp.array([0.25, 0.75]))}
    adapted = both.adapt(params, task.support, KEY)
    alone = [jnp.array(w) for w in ([0.0, -jnp.inf], [-jnp.inf, 0.0])]
    m = np.stack([both.predict({**params, "weights": w}, adapted, task.query.features) for w in alone])
    variance = 0.25 * (0.25 + m[0] ** 2) + 0.75 * (4 + m[1] ** 2) - (0.25 * m[0] + 0.75 * m[1]) ** 2
    assert_close(both.deviation(params, adapted, task.query.features), np.sqrt(variance))
    copied = mr.ensemble(knowing(ridge, 0.5), 2)
    params = copied.init(KEY)
    assert copied.deviation(params, copied.adapt(params, task.support, KEY), task.query.features).shape == (5, 4)
    assert mr.ensemble([knowing(ridge, 0.5), anil]).deviation is None
    assert mr.ensemble(ridge).deviation is None


def test_members_may_be_ensembles(different, task_batch):
    task, nested = task_batch(), mr.ensemble([mr.ensemble(different[0], 3), different[1]])
    params = nested.init(KEY)
    scores = everything(nested, task)(params)[2]
    inner = everything(mr.ensemble(different[0], 3), task)(params["members"][0])[2]
    assert_close(scores, (inner + everything(different[1], task)(params["members"][1])[2]) / 2)


def test_bad_arguments_are_refused_with_what_to_do(different):
    with pytest.raises(ValueError, match="at least one member"):
        mr.ensemble(different[0], members=0)
    with pytest.raises(ValueError, match="at least one member"):
        mr.ensemble([])
    with pytest.raises(ValueError, match="has its own length"):
        mr.ensemble(different, members=2)
    with pytest.raises(ValueError, match='"uniform", "validation" or "gate"'):
        mr.ensemble(different, weights="mean")
    with pytest.raises(ValueError, match="loss="):
        mr.ensemble(different, weights="gate")
    uniform = mr.ensemble(different)
    with pytest.raises(ValueError, match='weights="validation"'):
        mr.fit_weights(uniform, uniform.init(KEY), [], loss=LOGISTIC)
