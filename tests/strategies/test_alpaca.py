"""ALPaCA against numpy's closed forms, scikit-learn's Gaussian process and the Bayes-optimal predictor."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct

import metarec_jax as mr
from metarec_jax.core.solve import inverse_cholesky
from metarec_jax.strategies.likelihood import likelihood
from metarec_jax.types import Examples, Task

LOGISTIC = optax.losses.sigmoid_binary_cross_entropy
WIDTH = 4


@pytest.fixture
def linear_model():
    """The features themselves, and a head."""
    return mr.Model(
        init=lambda key: {"head": jnp.zeros(WIDTH), "bias": jnp.zeros(())},
        apply=lambda params, x: x @ params["head"] + params["bias"],
        embed=lambda params, x: x,
        width=WIDTH,
    )


def away_from_zero(params, seed=0):
    """Parameters with a prior that is full, of several scales, and noise that is not 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), params)


@partial(jax.jit, static_argnums=0)
def answers(strategy, params, task):
    """Posterior from the support, scores and deviations of the query, loss."""
    key = jax.random.key(0)
    posterior = strategy.adapt(params, task.support, key)
    scores, std = (f(params, posterior, task.query.features) for f in (strategy.predict, strategy.deviation))
    return posterior, scores, std, strategy.loss(params, task, key)[0]


def prior_covariance(params):
    """L L' in numpy."""
    unit = np.eye(WIDTH + 1) + (np.tril(params["below"], -1) if "below" in params else 0)
    root = np.exp(np.asarray(params["log_scale"], float))[:, None] * unit
    return root @ root.T


def covariance_of(posterior, params, u):
    """V of user u, from whichever of its two forms there is."""
    if posterior.factor is not None:
        return posterior.factor[u] @ posterior.factor[u].T
    return prior_covariance(params) - posterior.taken[u].T @ posterior.taken[u]


SUPPORTS = [pytest.param(7, id="more examples than features"), pytest.param(2, id="fewer")]


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("full", [True, False])
def test_posterior_and_loss_are_numpys_closed_form_in_float64(task_batch, linear_model, full, support):
    with jax.enable_x64(True):
        task = jax.tree.map(lambda x: np.asarray(x, np.float64), task_batch(width=WIDTH, support=support))
        task = task._replace(support=task.support._replace(target=task.support.target * 1.7 - 0.3))
        strategy = mr.alpaca(linear_model, full=full)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), strategy.init(jax.random.key(0)))
        params = away_from_zero(params)
        posterior, mean, std, value = answers(strategy, params, task)
        shared = {name: np.asarray(x) for name, x in params["model"].items()}
        variance, precision = np.exp(2 * float(params["log_noise"])), np.linalg.inv(prior_covariance(params))
        losses = []
        for u in range(5):
            n, q = int(task.support.mask[u].sum()), int(task.query.mask[u].sum())
            x = np.hstack([task.support.features[u, :n], np.ones((n, 1))])
            residual = task.support.target[u, :n] - (x[:, :-1] @ shared["head"] + shared["bias"])
            covariance = np.linalg.inv(precision + x.T @ x / variance)
            centre = covariance @ x.T @ residual / variance
            np.testing.assert_allclose(posterior.mean[u], centre, rtol=1e-9)
            np.testing.assert_allclose(covariance_of(posterior, params, u), covariance, rtol=1e-9, atol=1e-12)
            new = np.hstack([task.query.features[u, :q], np.ones((q, 1))])
            expected = new @ centre + new[:, :-1] @ shared["head"] + shared["bias"]
            deviation = np.sqrt(np.einsum("nf,fg,ng->n", new, covariance, new) + variance)
            np.testing.assert_allclose(mean[u, :q], expected, rtol=1e-9)
            np.testing.assert_allclose(std[u, :q], deviation, rtol=1e-9)
            losses.append(-stats.norm.logpdf(task.query.target[u, :q], expected, deviation).mean())
        np.testing.assert_allclose(value, np.mean(losses), rtol=1e-9)


def test_mean_and_deviation_are_those_of_scikit_learns_gaussian_process_with_a_linear_kernel(task_batch, linear_model):
    task = task_batch(width=WIDTH, mask=False)
    strategy = mr.alpaca(linear_model, noise=0.3)
    params = strategy.init(jax.random.key(0))
    _, mean, std, _ = answers(strategy, params, task)
    for u in range(5):
        process = GaussianProcessRegressor(DotProduct(1.0), alpha=0.3**2, optimizer=None)
        process.fit(task.support.features[u], task.support.target[u])
        expected, deviation = process.predict(task.query.features[u], return_std=True)
        np.testing.assert_allclose(mean[u], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(std[u], np.sqrt(deviation**2 + 0.3**2), rtol=1e-3)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("offset", [0.0, 8.0])  # full Newton steps from scores that are far off diverge
def test_logistic_posterior_is_the_laplace_approximation(task_batch, linear_model, offset, support):
    task = task_batch(width=WIDTH, support=support)
    strategy = mr.alpaca(linear_model, loss=LOGISTIC, scale=2.0, steps=8)
    params = away_from_zero(strategy.init(jax.random.key(0)))
    params["model"]["bias"] += offset
    posterior, logits, std, _ = answers(strategy, params, task)
    shared = {name: np.asarray(x, float) for name, x in params["model"].items()}
    precision = np.linalg.inv(prior_covariance(params))
    for u in range(5):
        n = int(task.support.mask[u].sum())
        x = np.hstack([task.support.features[u, :n], np.ones((n, 1))]).astype(float)
        start, y = x[:, :-1] @ shared["head"] + shared["bias"], task.support.target[u, :n]

        def objective(d, x=x, start=start, y=y):
            s = start + x @ d
            return np.logaddexp(0, s).sum() - y @ s + d @ precision @ d / 2

        mode = optimize.minimize(objective, np.zeros(WIDTH + 1), method="BFGS", options={"gtol": 1e-7}).x
        p = 1 / (1 + np.exp(-start - x @ mode))
        covariance = np.linalg.inv(precision + x.T @ (x * (p * (1 - p))[:, None]))
        np.testing.assert_allclose(posterior.mean[u], mode, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(covariance_of(posterior, params, u), covariance, rtol=1e-2, atol=1e-3)
        new = np.hstack([task.query.features[u], np.ones((4, 1))])
        m = new @ mode + new[:, :-1] @ shared["head"] + shared["bias"]
        v = np.einsum("nf,fg,ng->n", new, covariance, new)
        np.testing.assert_allclose(std[u], np.sqrt(v), rtol=1e-2)
        np.testing.assert_allclose(logits[u], m / np.sqrt(1 + np.pi * v / 8), rtol=1e-2, atol=1e-3)
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)  # the integral that MacKay's formula approximates
        exact = (1 / (1 + np.exp(-m[:, None] - np.sqrt(v)[:, None] * nodes))) @ weights / weights.sum()
        np.testing.assert_allclose(jax.nn.sigmoid(logits[u]), exact, atol=0.02)


def test_the_gradient_through_the_newton_steps_is_that_of_finite_differences(task_batch, linear_model):
    with jax.enable_x64(True):
        task = jax.tree.map(lambda x: np.asarray(x, np.float64), task_batch(width=WIDTH))
        strategy = mr.alpaca(linear_model, loss=LOGISTIC, steps=8)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), strategy.init(jax.random.key(0)))
        params, direction = away_from_zero(params), away_from_zero(params, seed=1)
        loss = jax.jit(lambda p: strategy.loss(p, task, jax.random.key(0))[0])
        _, slope = jax.jvp(loss, (params,), (direction,))
        up, down = (loss(jax.tree.map(lambda p, d, e=e: p + e * d, params, direction)) for e in (1e-5, -1e-5))
        np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-6)


class World:
    """Users with heads from a known correlated prior, and known noise: what is best for them is known."""

    noise = 0.5

    def __init__(self):
        self.rng = np.random.default_rng(0)
        root = np.tril(self.rng.normal(size=(WIDTH + 1, WIDTH + 1)), -1) + np.diag([1.5, 0.2, 1.0, 0.5, 0.7])
        self.mean, self.root = self.rng.normal(size=WIDTH + 1), root

    def tasks(self, users, support=6, query=10):
        heads = self.mean + self.rng.normal(size=(users, WIDTH + 1)) @ self.root.T

        def examples(n):
            x = self.rng.normal(size=(users, n, WIDTH))
            y = np.einsum("unf,uf->un", x, heads[:, :-1]) + heads[:, -1:] + self.rng.normal(0, self.noise, (users, n))
            return Examples(x.astype(np.float32), y.astype(np.float32), np.ones((users, n), np.float32))

        return Task(examples(support), examples(query))

    def bayes(self, task):
        """The exact posterior mean of every query target."""
        scores = []
        prior = self.root @ self.root.T
        for x, y, new in zip(task.support.features, task.support.target, task.query.features, strict=True):
            x, new = (np.hstack([a, np.ones((len(a), 1))]) for a in (x, new))
            gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + self.noise**2 * np.eye(len(x)))
            scores.append(new @ (self.mean + gain @ (y - x @ self.mean)))
        return np.stack(scores)


def test_meta_training_reaches_the_bayes_error_and_calibrated_intervals(linear_model):
    world, strategy, optimizer = World(), mr.alpaca(linear_model), optax.adam(0.02)
    params = strategy.init(jax.random.key(0))
    state, step = optimizer.init(params), jax.jit(mr.meta_step(strategy.loss, optimizer))
    for _ in range(600):
        params, state, _ = step(params, state, world.tasks(64), jax.random.key(0))
    for support in (2, 6, 20):
        task = world.tasks(1000, support=support)
        _, score, std, _ = answers(strategy, params, task)
        error = np.abs(task.query.target - score)
        best = np.sqrt(np.mean((task.query.target - world.bayes(task)) ** 2))
        assert np.sqrt(np.mean(error**2)) < 1.05 * best
        assert np.mean(error < stats.norm.ppf(0.95) * std) == pytest.approx(0.9, abs=0.03)
    np.testing.assert_allclose(np.exp(params["log_noise"]), world.noise, rtol=0.1)


def test_deviation_shrinks_with_examples_and_survives_histories(task_batch, linear_model):
    task, key = task_batch(width=WIDTH, mask=False), jax.random.key(0)
    one = mr.alpaca(linear_model)
    params = one.init(key)
    known = answers(one, params, task)[2]
    blind = task.support._replace(mask=np.zeros_like(task.support.mask))
    unknown = answers(one, params, Task(blind, task.query))[2]
    assert (known < unknown).all()
    norm = np.square(task.query.features).sum(-1)
    np.testing.assert_allclose(unknown, np.sqrt(norm + 1 + 1), rtol=1e-5)  # the prior, its bias, the noise
    history = answers(mr.with_history(reading_now(linear_model)), params, task)[2]
    np.testing.assert_allclose(history, known, rtol=1e-6)


def reading_now(model):
    """`alpaca` with a model that is given histories and reads what is now."""
    return mr.alpaca(
        model._replace(
            apply=lambda params, features: model.apply(params, features.now),
            embed=lambda params, features: model.embed(params, features.now),
        )
    )


def test_bad_arguments_are_refused_at_construction(tiny_model):
    with pytest.raises(ValueError, match="embed"):
        mr.alpaca(mr.Model(tiny_model.init, tiny_model.apply))
    with pytest.raises(ValueError, match="negative log-likelihood"):
        mr.alpaca(tiny_model, loss=partial(optax.losses.huber_loss, delta=1.0))
    for bad in ({"steps": 0}, {"scale": 0.0}, {"noise": -1.0}):
        with pytest.raises(ValueError, match="need steps"):
            mr.alpaca(tiny_model, **bad)


def test_likelihoods_are_told_apart_by_the_loss():
    assert likelihood(LOGISTIC) == "bernoulli"
    assert likelihood(optax.losses.squared_error) == likelihood(optax.losses.l2_loss) == "gaussian"
    assert likelihood(optax.losses.huber_loss) is None


def ill_conditioned(n: int, condition: float) -> np.ndarray:
    """A symmetric matrix with eigenvalues from 1 to `condition`."""
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    return q @ np.diag(np.geomspace(1, condition, n)) @ q.T


def test_the_inverse_cholesky_factor_is_right_in_single_precision():
    for condition in (10.0, 1e3, 1e4):
        matrix = ill_conditioned(65, condition)
        exact = np.linalg.inv(np.linalg.cholesky(matrix))
        found = np.asarray(inverse_cholesky(jnp.asarray(matrix, jnp.float32)))
        assert np.abs(found - exact).max() < 2e-6 * condition**0.5


def test_the_inverse_cholesky_factor_and_its_derivative_are_those_of_the_plain_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 5, 5))
    matrix = a @ a.swapaxes(-1, -2) + np.eye(5)
    with jax.enable_x64(True):
        matrix = jnp.asarray(matrix)
        root = inverse_cholesky(matrix)
        np.testing.assert_allclose(root, np.linalg.inv(np.linalg.cholesky(np.asarray(matrix))), rtol=1e-10, atol=1e-12)

        def plain(x):
            return jnp.sin(jnp.linalg.inv(jnp.linalg.cholesky(x))).sum()

        ours = jax.grad(lambda x: jnp.sin(inverse_cholesky(x)).sum())(matrix)
        theirs = jax.grad(plain)(matrix)
        wide = jnp.asarray(ill_conditioned(65, 1e4))  # as wide as the default network's embedding, and its bias
        np.testing.assert_allclose(inverse_cholesky(wide) @ jnp.linalg.cholesky(wide), np.eye(65), atol=1e-9)
        both = (g + g.swapaxes(-1, -2) for g in (ours, theirs))  # along symmetric changes, the only ones there are
        np.testing.assert_allclose(*both, rtol=1e-8, atol=1e-10)
