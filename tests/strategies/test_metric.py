"""Prototypes, LWA and NLBA against their defining equations in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.neighbors import NearestCentroid

import metarec_jax as mr

LOGISTIC = optax.losses.sigmoid_binary_cross_entropy
NAMES = ("prototypes", "lwa", "nlba")


def trained(strategy):
    """Parameters away from what they start as."""
    rng = np.random.default_rng(0)
    params = strategy.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)


def correction(name, own, phi, p):
    """The equation of each docstring for one example: phi [width], class means p [2, width]."""
    own = {key: np.asarray(value) for key, value in own.items()}
    if name == "prototypes":
        return own["scale"] * (np.sum((phi - p[0]) ** 2) - np.sum((phi - p[1]) ** 2))
    if name == "lwa":
        return phi @ (own["weight"][0] * p[0] + own["weight"][1] * p[1])
    bias = own["bias"] + p[0] @ own["shift"][0] + p[1] @ own["shift"][1]
    return np.maximum(phi @ own["layer"] + bias, 0) @ own["out"] + p[0] @ own["skip"][0] + p[1] @ own["skip"][1]


@pytest.mark.parametrize("loss", [LOGISTIC, optax.losses.squared_error])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_defining_equation(name, loss, task_batch, tiny_model, jitted):
    task, key = task_batch(), jax.random.key(0)
    task = task._replace(support=task.support._replace(features=2 * task.support.features))
    if loss is not LOGISTIC:
        task = task._replace(support=task.support._replace(target=3 * task.support.target - 1))
    strategy = jitted(mr.STRATEGIES[name](tiny_model, loss=loss))
    params = trained(strategy)
    scores = strategy.predict(params, strategy.adapt(params, task.support, key), task.query.features)
    phi = {part: np.asarray(tiny_model.embed(params["model"], getattr(task, part).features)) for part in task._fields}
    shared = np.asarray(tiny_model.apply(params["model"], task.query.features))
    k, centre = np.exp(params["log_count"]), np.asarray(params["centre"])
    for u in range(5):
        n = int(task.support.mask[u].sum())
        y = task.support.target[u, :n]
        liked = y if loss is LOGISTIC else 1 / (1 + np.exp(-y))
        totals = [k + (1 - liked).sum(), k + liked.sum()]
        sums = [(1 - liked) @ phi["support"][u, :n], liked @ phi["support"][u, :n]]
        p = [(k * centre[c] + sums[c]) / totals[c] for c in (0, 1)]
        odds = float(params["odds"]) * np.log(totals[1] / totals[0])
        expected = [shared[u, j] + correction(name, params["own"], phi["query"][u, j], p) + odds for j in range(4)]
        np.testing.assert_allclose(scores[u], expected, rtol=1e-4, atol=1e-5)


def test_prototypes_without_a_prior_or_a_shared_score_are_the_nearest_centroid_classifier(jitted):
    model = mr.Model(lambda key: {}, lambda params, x: jnp.zeros(x.shape[:-1]), lambda params, x: x, width=3)
    rng = np.random.default_rng(0)
    x, new = (rng.normal(size=(1, n, 3)).astype(np.float32) for n in (12, 200))
    y = (np.arange(12) % 3 == 0).astype(np.float32)[None]
    strategy = jitted(mr.prototypes(model, loss=LOGISTIC, count=1e-6))
    params = strategy.init(jax.random.key(0)) | {"odds": jnp.zeros(())}
    classes = strategy.adapt(params, mr.Examples(x, y, np.ones((1, 12), np.float32)), jax.random.key(0))
    oracle = NearestCentroid().fit(x[0], y[0]).predict(new[0])
    np.testing.assert_array_equal(strategy.predict(params, classes, new)[0] > 0, oracle > 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_without_examples_is_its_learned_prior(name, task_batch, tiny_model, jitted):
    support = task_batch().support._replace(target=np.ones((5, 7), np.float32))
    strategy = jitted(mr.STRATEGIES[name](tiny_model, loss=LOGISTIC))
    params = trained(strategy)
    classes = strategy.adapt(params, support, jax.random.key(0))
    np.testing.assert_allclose(classes.mean[:, 0], np.broadcast_to(params["centre"][0], (5, 4)), rtol=1e-6)
    assert (classes.log_odds > 0).all()


@pytest.mark.parametrize("name", ["prototypes", "lwa"])
def test_without_support_the_shared_model_answers_at_first(name, task_batch, tiny_model, jitted):
    task, key = task_batch(), jax.random.key(0)
    strategy = jitted(mr.STRATEGIES[name](tiny_model, loss=LOGISTIC))
    params = strategy.init(key)
    classes = strategy.adapt(params, task.support._replace(mask=np.zeros((5, 7), np.float32)), key)
    scores = strategy.predict(params, classes, task.query.features)
    np.testing.assert_allclose(scores, tiny_model.apply(params["model"], task.query.features), rtol=1e-5)


def test_nlba_moves_hidden_biases_and_the_output_bias_only(task_batch, tiny_model, jitted):
    """With every hidden unit on the network is linear: a user's biases can only shift all scores alike."""
    task, key = task_batch(), jax.random.key(0)
    strategy = jitted(mr.nlba(tiny_model, loss=LOGISTIC))
    params = trained(strategy)
    params["own"]["bias"] += 100.0
    scores = strategy.predict(params, strategy.adapt(params, task.support, key), task.query.features)
    blind = strategy.adapt(params, task.support._replace(mask=np.zeros((5, 7), np.float32)), key)
    shift = np.asarray(scores - strategy.predict(params, blind, task.query.features))
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-3)
    assert np.abs(shift).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_are_refused_at_construction(name, tiny_model):
    with pytest.raises(ValueError, match="embed"):
        mr.STRATEGIES[name](mr.Model(tiny_model.init, tiny_model.apply))
    with pytest.raises(ValueError, match="count must be positive"):
        mr.STRATEGIES[name](tiny_model, count=0.0)
    if name == "nlba":
        with pytest.raises(ValueError, match="hidden"):
            mr.nlba(tiny_model, hidden=0)
