"""Learned masks, regularisers and gates against hand-written inner loops in numpy and the plain engine."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.core._loop import Factored
from metarec_jax.strategies.structure import straight_through

LOSS = optax.losses.squared_error
KEY, STEP = jax.random.key(0), 0.05
INNER = optax.sgd(STEP)


def assert_close(a, b, rtol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def user_gradient(model, examples, u):
    """The gradient of one user's mean support loss, as a function of the weights."""
    n = int(examples.mask[u].sum())
    return jax.grad(lambda w: LOSS(model.apply(w, examples.features[u, :n]), examples.target[u, :n]).mean())


def noise(tree, seed=0, scale=1.0):
    r = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(scale * r.normal(size=a.shape), jnp.float32), tree)


def test_the_step_function_passes_its_gradient_straight_through():
    m = jnp.array([-2.0, -1e-9, 0.0, 3.0])
    np.testing.assert_array_equal(straight_through(m), [0, 0, 1, 1])
    np.testing.assert_array_equal(jax.grad(lambda m: straight_through(m) @ jnp.arange(4.0))(m), [0, 1, 2, 3])


@pytest.mark.parametrize("masks", ["array", "row", "column", "weight"])
def test_masked_weights_stay_and_the_others_take_plain_gradient_steps(masks, task_batch, tiny_model, jitted):
    support = task_batch().support
    strategy = jitted(mr.sparse_maml(tiny_model, loss=LOSS, inner=INNER, steps=3, masks=masks))
    params = strategy.init(KEY)
    shapes = {
        "array": {"w1": (), "b1": (), "w2": (), "b2": ()},
        "row": {"w1": (3, 1), "b1": (4,), "w2": (4,), "b2": ()},
        "column": {"w1": (4,), "b1": (4,), "w2": (4,), "b2": ()},
        "weight": {"w1": (3, 4), "b1": (4,), "w2": (4,), "b2": ()},
    }
    assert jax.tree.map(jnp.shape, params["mask"]) == shapes[masks]
    params["mask"] = noise(params["mask"], seed=3)
    found = core.weights(params["model"], strategy.adapt(params, support, KEY))
    on = jax.tree.map(lambda m: np.asarray(0.1 + m >= 0, float), params["mask"])
    assert 0 < np.mean(np.concatenate([np.ravel(m) for m in jax.tree.leaves(on)])) < 1
    for u in range(5):
        w, gradient = params["model"], user_gradient(tiny_model, support, u)
        for _ in range(3):
            w = jax.tree.map(lambda w, m, g: w - STEP * m * g, w, on, gradient(w))
        assert_close(jax.tree.map(lambda x: x[u], found), w)


def test_a_mask_learns_from_what_its_weight_would_gain_also_while_it_is_off(task_batch, tiny_model, jitted):
    """Straight through: the gradient of m is that of a factor on the update, at the mask's value."""
    task = task_batch()
    strategy = jitted(mr.sparse_maml(tiny_model, loss=LOSS, inner=INNER, steps=2))
    params = strategy.init(KEY)
    params["mask"] = noise(params["mask"], seed=3)
    gradient = jax.jit(jax.grad(lambda p: strategy.loss(p, task, KEY)[0]))(params)["mask"]

    def factors_loss(factors):
        fast = core.inner.adapt(
            tiny_model.apply, params["model"], task.support, loss=LOSS, optimizer=INNER, steps=2, step_size=factors
        )
        scores = core.inner.predict(tiny_model.apply, params["model"], fast, task.query.features)
        return core.query_loss(scores, task.query, LOSS)

    at = jax.tree.map(lambda m: (0.1 + m >= 0).astype(jnp.float32), params["mask"])
    expected = jax.jit(jax.grad(factors_loss))(at)
    assert_close(gradient, expected)
    off = jax.tree.map(lambda m, g: np.any((np.asarray(m) == 0) & (np.abs(g) > 1e-5)), at, gradient)
    assert any(jax.tree.leaves(off))


@pytest.mark.parametrize("name", ["sparse_maml", "meta_reg"])
def test_layers_stay_factored(name, task_batch, jitted):
    def apply(params, x):
        return (jnp.tanh(x @ params["w1"]) @ params["w2"]).sum(-1)

    def init(key):
        return {"w1": jax.random.normal(key, (128, 256)) / 16, "w2": jnp.zeros((256, 128))}

    strategy = jitted(mr.STRATEGIES[name](mr.Model(init, apply), loss=LOSS, steps=2))
    adapted = strategy.adapt(strategy.init(KEY), task_batch(width=128).support, KEY)
    assert [type(leaf) for leaf in adapted.leaves] == [Factored, Factored]


def test_the_regulariser_pulls_each_array_to_its_start_by_its_own_strength(task_batch, tiny_model, jitted):
    support = task_batch().support
    strategy = jitted(mr.meta_reg(tiny_model, loss=LOSS, inner=INNER, steps=4, penalty=0.7))
    params = strategy.init(KEY)
    params["log_strength"] = noise(params["log_strength"], 1)
    params["log_step_size"] = noise(params["log_step_size"], 2, 0.3)
    found = core.weights(params["model"], strategy.adapt(params, support, KEY))
    strength = jax.tree.map(lambda s: 0.7 * np.exp(s), params["log_strength"])
    size = jax.tree.map(lambda s: STEP * np.exp(s), params["log_step_size"])
    for u in range(5):
        start, gradient = params["model"], user_gradient(tiny_model, support, u)
        w = start
        for _ in range(4):
            pulled = jax.tree.map(lambda g, c, w, w0: g + c * (w - w0), gradient(w), strength, w, start)
            w = jax.tree.map(lambda w, a, g: w - a * g, w, size, pulled)
        assert_close(jax.tree.map(lambda x: x[u], found), w)


def test_the_strengths_gradient_is_that_of_finite_differences(task_batch, tiny_model, jitted):
    task = task_batch()
    strategy = jitted(mr.meta_reg(tiny_model, loss=LOSS, inner=optax.sgd(0.3), steps=4))
    params = strategy.init(KEY)
    loss = jax.jit(lambda s: strategy.loss({**params, "log_strength": s}, task, KEY)[0])
    at = jax.tree.map(lambda s: s + 1.0, params["log_strength"])
    gradient = jax.grad(loss)(at)
    for name in at:
        up, down = (loss({**at, name: at[name] + d}) for d in (0.05, -0.05))
        np.testing.assert_allclose(gradient[name], (up - down) / 0.1, rtol=0.05, atol=1e-5)


def test_a_gate_changes_what_its_feature_adds_to_the_shared_score(task_batch, tiny_model, jitted):
    task = task_batch()
    strategy = jitted(mr.gated(tiny_model, loss=LOSS, inner=INNER, steps=2, hidden=3))
    params = strategy.init(KEY)
    empty = strategy.adapt(params, task.support._replace(mask=np.zeros((5, 7), np.float32)), KEY)
    net = params["model"]
    shared = tiny_model.apply(net["model"], task.query.features)
    assert_close(strategy.predict(params, empty, task.query.features), shared)

    adapted = strategy.adapt(params, task.support, KEY)
    own = core.weights(net, adapted)
    assert {name for name, leaf in own.items() if jax.tree.leaves(leaf)} == {"gate", "bias"}
    phi = np.asarray(tiny_model.embed(net["model"], task.query.features))
    h = np.concatenate([phi, np.maximum(phi @ np.asarray(net["layer"]) + np.asarray(net["shift"]), 0)], -1)
    change = np.einsum("uj,j,unj->un", np.tanh(own["gate"]), net["worth"], h) + np.asarray(own["bias"])[:, None]
    assert_close(strategy.predict(params, adapted, task.query.features), shared + change)

    # one step by hand: d loss / d z_j = mean of residual * v_j * h_j at z = 0
    one = jitted(mr.gated(tiny_model, loss=LOSS, inner=INNER, steps=1, hidden=3))
    own = core.weights(net, one.adapt(params, task.support, KEY))
    for u in range(5):
        n = int(task.support.mask[u].sum())
        phi = np.asarray(tiny_model.embed(net["model"], task.support.features[u, :n]))
        h = np.concatenate([phi, np.maximum(phi @ np.asarray(net["layer"]), 0)], -1)
        residual = np.asarray(tiny_model.apply(net["model"], task.support.features[u, :n])) - task.support.target[u, :n]
        slope = 2 * (residual[:, None] * h * np.asarray(net["worth"])).mean(0)
        np.testing.assert_allclose(own["gate"][u], -STEP * slope, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_refused_with_what_to_do(tiny_model):
    with pytest.raises(ValueError, match="one of array, row, column, weight"):
        mr.sparse_maml(tiny_model, masks="rows")
    with pytest.raises(ValueError, match="start must be 0 or more"):
        mr.sparse_maml(tiny_model, start=-1.0)
    with pytest.raises(ValueError, match="penalty must be more than 0"):
        mr.meta_reg(tiny_model, penalty=0.0)
    with pytest.raises(ValueError, match="choose from"):
        mr.meta_reg(tiny_model, groups=("heads",))
    with pytest.raises(ValueError, match="needs a model with `embed`"):
        mr.gated(mr.Model(tiny_model.init, tiny_model.apply))
