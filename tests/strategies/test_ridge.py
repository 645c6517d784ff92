"""The ridge head against numpy's and scikit-learn's solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression

import metarec_jax as mr
from metarec_jax.strategies.ridge import newton_step


def test_one_step_on_squared_error_is_numpys_ridge_solution(task_batch, tiny_model):
    support = task_batch().support
    strategy = mr.ridge(tiny_model, penalty=0.7, bias_penalty=0.2)
    params = strategy.init(jax.random.key(0))
    head = strategy.adapt(params, support, jax.random.key(0))
    for u in range(len(support.target)):
        n = int(support.mask[u].sum())
        phi = np.asarray(tiny_model.embed(params["model"], support.features[u, :n]))
        residual = support.target[u, :n] - np.asarray(tiny_model.apply(params["model"], support.features[u, :n]))
        x = np.hstack([phi, np.ones((n, 1))])
        # d/dz of sum (residual - x z)^2 + z' diag(penalty) z / 2 is zero
        solution = np.linalg.solve(2 * x.T @ x + np.diag([0.7] * phi.shape[1] + [0.2]), 2 * x.T @ residual)
        np.testing.assert_allclose(head["delta"][u], solution[:-1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(head["bias"][u], solution[-1], rtol=1e-4, atol=1e-5)


def test_newton_steps_on_the_logistic_loss_reach_scikit_learns_solution():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(1, 40, 3)).astype(np.float32)
    target = (phi[0, :, 0] + rng.normal(size=40) > 0).astype(np.float32)[None]
    support = mr.Examples(phi, target, np.ones((1, 40), np.float32))
    head = {"delta": jnp.zeros((1, 3)), "bias": jnp.zeros(1)}
    penalty = {"delta": jnp.float32(0.5), "bias": jnp.float32(0.5)}
    for _ in range(6):
        head = newton_step(head, phi, jnp.zeros((1, 40)), support, optax.losses.sigmoid_binary_cross_entropy, penalty)
    x = np.hstack([phi[0], np.ones((40, 1))])
    oracle = LogisticRegression(C=1 / 0.5, fit_intercept=False, tol=1e-8).fit(x, target[0]).coef_[0]
    np.testing.assert_allclose(np.append(head["delta"][0], head["bias"][0]), oracle, rtol=1e-3, atol=1e-4)


def test_without_support_the_shared_model_answers(task_batch, tiny_model):
    task = task_batch()
    strategy = mr.ridge(tiny_model)
    params = strategy.init(jax.random.key(0))
    head = strategy.adapt(params, task.support._replace(mask=np.zeros((5, 7))), jax.random.key(0))
    expected = tiny_model.apply(params["model"], task.query.features)
    np.testing.assert_allclose(strategy.predict(params, head, task.query.features), expected, rtol=1e-6)


def test_a_model_without_features_is_refused_at_construction(tiny_model):
    with pytest.raises(ValueError, match="embed"):
        mr.ridge(mr.Model(tiny_model.init, tiny_model.apply))
    with pytest.raises(ValueError, match="positive penalties"):
        mr.ridge(tiny_model, penalty=0.0)
