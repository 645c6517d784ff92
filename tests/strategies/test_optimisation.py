"""What distinguishes the strategies that run inner gradient steps: Meta-SGD, MAML++, iMAML, CAVIA, LiMAML."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.strategies.decoder import decoder
from metarec_jax.strategies.limaml import block

LOSS = optax.losses.squared_error
STEP = optax.sgd(0.1)
KEY = jax.random.key(0)


def close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def support_loss(apply, params, examples):
    """Mean loss of one user's real examples, written out."""
    return (LOSS(apply(params, examples.features), examples.target) * examples.mask).sum() / examples.mask.sum()


def meta_gradient(strategy, params, task):
    return jax.jit(jax.grad(lambda p: strategy.loss(p, task, KEY)[0]))(params)


def test_meta_sgd_steps_by_theta_minus_alpha_times_gradient_elementwise(task_batch, tiny_model, jitted):
    support = task_batch().support
    strategy = jitted(mr.meta_sgd(tiny_model, inner=STEP))
    params = strategy.init(KEY)
    assert jax.tree.map(jnp.shape, params["step_size"]) == jax.tree.map(jnp.shape, params["model"])
    change = jax.tree.map(lambda w: 2 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params["model"])
    got = core.weights(params["model"], strategy.adapt(params | {"step_size": change}, support, KEY))
    assert min(1 + a.min() for a in jax.tree.leaves(change)) < 0  # steps uphill are allowed
    for u in range(5):
        user = jax.tree.map(lambda x, u=u: x[u], support)
        gradient = jax.grad(lambda p, user=user: support_loss(tiny_model.apply, p, user))(params["model"])
        expected = jax.tree.map(lambda w, a, g: w - 0.1 * (1 + a) * g, params["model"], change, gradient)
        close(jax.tree.map(lambda w, u=u: w[u], got), expected)


def test_meta_sgd_starts_as_maml_and_learns_a_size_for_every_weight(task_batch, tiny_model):
    task = task_batch()
    learned, fixed = mr.meta_sgd(tiny_model, inner=STEP), mr.maml(tiny_model, steps=1, inner=STEP)
    params, plain = learned.init(KEY), fixed.init(KEY)
    one, two = meta_gradient(learned, params, task), meta_gradient(fixed, plain, task)
    close(one["model"], two["model"])
    close(jax.tree.map(jnp.sum, one["step_size"]), two["log_step_size"])
    assert all((np.abs(g) > 0).all() for g in jax.tree.leaves(one["step_size"]))


def test_mamlpp_with_equal_rates_and_no_multi_step_loss_is_maml(task_batch, tiny_model):
    task = task_batch()
    layered, plain = mr.mamlpp(tiny_model, inner=STEP, multi_step=0), mr.maml(tiny_model, inner=STEP, steps=3)
    one, two = (meta_gradient(s, s.init(KEY), task) for s in (layered, plain))
    close(one["model"], two["model"])
    close(jax.tree.map(jnp.sum, one["log_step_size"]), two["log_step_size"])
    assert {g.shape for g in jax.tree.leaves(one["log_step_size"])} == {(3,)}


def test_mamlpp_takes_each_step_of_each_layer_with_its_own_rate_and_looks_at_every_step(task_batch, tiny_model, jitted):
    task, steps = task_batch(mask=False), 3
    strategy = jitted(mr.mamlpp(tiny_model, inner=STEP, steps=steps, multi_step=0.3))
    params = strategy.init(KEY)
    rates = {n: jnp.linspace(-1, 1, steps) + i for i, n in enumerate(sorted(params["model"]))}
    params = params | {"log_step_size": rates}
    losses = np.zeros(steps)
    for u in range(5):
        support, query = (jax.tree.map(lambda x, u=u: x[u], part) for part in task)
        own = params["model"]
        for k in range(steps):
            gradient = jax.grad(lambda p, user=support: support_loss(tiny_model.apply, p, user))(own)
            own = {n: w - 0.1 * np.exp(rates[n][k]) * gradient[n] for n, w in own.items()}
            losses[k] += support_loss(tiny_model.apply, own, query) / 5
        got = core.weights(params["model"], strategy.adapt(params, task.support, KEY))
        close({n: w[u] for n, w in got.items()}, own)
    expected = 0.7 * losses[2] + 0.3 * (losses[0] + losses[1]) / 2
    np.testing.assert_allclose(strategy.loss(params, task, KEY)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(("options", "tolerance"), [({}, 0.02), ({"steps": 60, "iterations": 8}, 1e-4)])
def test_imaml_has_the_meta_gradient_of_the_exact_proximal_minimum(options, tolerance, task_batch, jitted):
    """A linear model, solved in float64: w_u = (H + l)^-1 (l theta + X'y 2/n), gradient l (H + l)^-1 dL_query."""
    model = mr.Model(
        lambda key: {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.2)}, lambda p, x: x @ p["w"] + p["b"]
    )
    task, damping = task_batch(mask=False), 8.0  # the default: 4 times the curvature of the squared error
    strategy = jitted(mr.imaml(model, **options))
    params = strategy.init(KEY)
    theta, expected, value = np.array([0.3, -0.2, 0.1, 0.2]), np.zeros(4), 0.0
    for u in range(5):
        x, xq = (np.c_[np.asarray(part.features[u], float), np.ones(len(part.target[u]))] for part in task)
        y, yq = (np.asarray(part.target[u], float) for part in task)
        system = 2 * x.T @ x / len(y) + damping * np.eye(4)
        own = np.linalg.solve(system, damping * theta + 2 * x.T @ y / len(y))
        error = xq @ own - yq
        expected += damping * np.linalg.solve(system, 2 * xq.T @ error / len(yq)) / 5
        value += (error**2).mean() / 5
    np.testing.assert_allclose(strategy.loss(params, task, KEY)[0], value, rtol=tolerance)
    gradient = meta_gradient(strategy, params, task)["model"]
    got = np.append(gradient["w"], gradient["b"])
    assert np.linalg.norm(got - expected) < tolerance * np.linalg.norm(expected)


def test_imaml_agrees_with_maml_unrolled_to_convergence_on_the_same_proximal_problem(task_batch, tiny_model):
    task, logistic = task_batch(), optax.losses.sigmoid_binary_cross_entropy
    strategy = mr.imaml(tiny_model, loss=logistic)  # all defaults: damping 1, sgd(0.16, momentum=0.5), 16 steps
    params = strategy.init(KEY)

    def unrolled(model_params):
        optimizer = core.implicit.proximal(optax.sgd(0.3), 1.0)
        fast = core.inner.adapt(
            tiny_model.apply, model_params, task.support, loss=logistic, optimizer=optimizer, steps=60
        )
        scores = core.inner.predict(tiny_model.apply, model_params, fast, task.query.features)
        return core.query_loss(scores, task.query, logistic)

    expected = jax.flatten_util.ravel_pytree(jax.jit(jax.grad(unrolled))(params["model"]))[0]
    got = jax.flatten_util.ravel_pytree(meta_gradient(strategy, params, task)["model"])[0]
    assert np.linalg.norm(got - expected) < 0.01 * np.linalg.norm(expected)


def test_cavia_moves_only_a_context_that_starts_at_zero_by_gradient_steps(task_batch, tiny_model, jitted):
    support = task_batch().support
    strategy = jitted(mr.cavia(tiny_model, inner=STEP, steps=2, size=6))
    params = strategy.init(KEY) | {"log_step_size": jnp.log(3.0)}
    got = strategy.adapt(params, support, KEY)
    assert got.shape == (5, 6)
    network = decoder(tiny_model, 6)
    for u in range(5):
        user = jax.tree.map(lambda x, u=u: x[u : u + 1], support)
        gradient = jax.grad(
            lambda c, user=user: support_loss(lambda c, x: network.apply(params["network"], c, x), c, user)
        )
        context = np.zeros((1, 6))
        for _ in range(2):
            context = context - 0.3 * gradient(context)
        close(got[u], context[0])
    empty = support._replace(mask=np.zeros_like(support.mask))
    np.testing.assert_array_equal(strategy.adapt(params, empty, KEY), 0)


def test_limaml_keeps_what_the_adapted_block_says_and_nothing_else(task_batch, tiny_model, jitted):
    strategy = jitted(mr.limaml(tiny_model, inner=STEP, steps=2, size=6, hidden=5))
    params, network = strategy.init(KEY), decoder(tiny_model, 6)
    params["log_step_size"]["w2"] = jnp.log(2.0)
    small, large = task_batch().support, task_batch(support=30).support
    got = strategy.adapt(params, small, KEY)
    assert got.shape == strategy.adapt(params, large, KEY).shape == (5, 6)
    for u in range(5):
        user = jax.tree.map(lambda x, u=u: x[u : u + 1], small)
        own = params["block"]
        for _ in range(2):
            gradient = jax.grad(
                lambda p, user=user: support_loss(
                    lambda p, x: network.apply(params["network"], block(p, jnp.ones((1, 1))), x), p, user
                )
            )(own)
            own = {n: w - 0.1 * (2.0 if n == "w2" else 1.0) * gradient[n] for n, w in own.items()}
        close(got[u], block(own, jnp.ones(1)))
    scores = strategy.predict(params, got, small.features)
    close(scores, network.apply(params["network"], got, small.features))


def test_limaml_trains_both_parts(task_batch, tiny_model, jitted):
    strategy = jitted(mr.limaml(tiny_model))
    gradient = meta_gradient(strategy, strategy.init(KEY), task_batch())
    assert all(np.abs(gradient[part][leaf]).max() > 0 for part, leaf in [("block", "w2"), ("network", "head")])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mr.meta_sgd, {"groups": ("haed",)}, "choose from embedding, decision, head"),
        (mr.mamlpp, {"steps": 0}, "steps >= 1"),
        (mr.mamlpp, {"multi_step": 1.0}, "multi_step < 1"),
        (mr.imaml, {"damping": 0.0}, "damping must be more than 0"),
        (mr.imaml, {"iterations": 0}, "iterations 1 or more"),
        (mr.cavia, {"size": 0}, "size >= 1"),
        (mr.limaml, {"hidden": 0}, "hidden must be 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(make, options, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        make(tiny_model, **options)


@pytest.mark.parametrize("make", [mr.cavia, mr.limaml])
def test_a_model_without_embed_is_refused(make, tiny_model):
    with pytest.raises(ValueError, match="needs a model with `embed`"):
        make(mr.Model(tiny_model.init, tiny_model.apply))
