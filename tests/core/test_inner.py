"""The inner loop against closed forms, float64 finite differences and a plain Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax import core
from metarec_jax.types import Examples, Task


def squared(scores, target):
    return (scores - target) ** 2


def linear(params, x):
    return x @ params["w"]


def linear_task(seed, users=3, n=6, q=4, width=2):
    rng = np.random.default_rng(seed)

    def examples(k):
        return Examples(rng.normal(size=(users, k, width)), rng.normal(size=(users, k)), np.ones((users, k)))

    return rng.normal(size=width), Task(examples(n), examples(q))


def meta_loss(apply, params, task, **options):
    fast = core.inner.adapt(apply, params, task.support, loss=squared, **options)
    return core.query_loss(core.inner.predict(apply, params, fast, task.query.features), task.query, squared)


def test_one_step_on_linear_regression_matches_the_hand_derived_meta_gradient():
    w, task = linear_task(0)
    rate, (x, y, _), (xq, yq, _) = 0.1, task.support, task.query
    expected = np.zeros_like(w)
    for u in range(len(x)):
        n, q = len(y[u]), len(yq[u])
        adapted = w - rate * 2 / n * x[u].T @ (x[u] @ w - y[u])
        outer = 2 / q * xq[u].T @ (xq[u] @ adapted - yq[u])
        expected += (np.eye(len(w)) - rate * 2 / n * x[u].T @ x[u]).T @ outer / len(x)
    with jax.enable_x64(True):
        gradient = jax.grad(lambda p: meta_loss(linear, p, task, optimizer=optax.sgd(rate)))({"w": jnp.array(w)})
    np.testing.assert_allclose(gradient["w"], expected, rtol=1e-12)


def test_a_count_adds_examples_that_pull_nowhere():
    w, task = linear_task(0)
    x, y, mask = task.support
    support = task.support._replace(mask=(mask * (np.arange(y.shape[1]) < [[1], [3], [6]])).astype(float))
    fast = core.inner.adapt(linear, {"w": w}, support, loss=squared, optimizer=optax.sgd(0.1), count=2.0)["w"]
    for u, n in enumerate((1, 3, 6)):
        slope = 2 / (n + 2) * x[u, :n].T @ (x[u, :n] @ w - y[u, :n])
        np.testing.assert_allclose(fast[u], w - 0.1 * slope, rtol=1e-5)


def test_first_order_drops_exactly_the_second_order_factor():
    w, task = linear_task(1)
    rate, (x, y, _), (xq, yq, _) = 0.1, task.support, task.query
    expected = np.zeros_like(w)
    for u in range(len(x)):
        adapted = w - rate * 2 / len(y[u]) * x[u].T @ (x[u] @ w - y[u])
        expected += 2 / len(yq[u]) * xq[u].T @ (xq[u] @ adapted - yq[u]) / len(x)
    with jax.enable_x64(True):
        gradient = jax.grad(
            lambda p: meta_loss(linear, p, task, optimizer=optax.sgd(rate), first_order=True)
        )({"w": jnp.array(w)})  # fmt: skip
    np.testing.assert_allclose(gradient["w"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "steps"), [(optax.sgd(0.2), 3), (optax.sgd(0.1, momentum=0.9), 2), (optax.adam(0.05), 2)]
)
def test_meta_gradient_agrees_with_finite_differences_in_float64(task_batch, tiny_model, optimizer, steps):
    task = task_batch()
    with jax.enable_x64(True):
        task = jax.tree.map(lambda x: jnp.array(x, jnp.float64), task)
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float64), tiny_model.init(jax.random.key(1)))
        inputs = {"params": params, "step_size": {"w1": 0.7, "b1": 1.0, "w2": 1.3, "b2": 1.0}}

        @jax.jit
        def loss(inputs):
            return meta_loss(
                tiny_model.apply, inputs["params"], task,
                optimizer=optimizer, steps=steps, step_size=inputs["step_size"],
            )  # fmt: skip

        direction = jax.tree.map(lambda x: jnp.sin(1 + jnp.arange(jnp.size(x))).reshape(jnp.shape(x)), inputs)

        def moved(h):
            return loss(jax.tree.map(lambda x, d: x + h * d, inputs, direction))

        slope = sum(
            jnp.vdot(g, d)
            for g, d in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(loss))(inputs), direction)), strict=True)
        )
        h = 1e-4
        numeric = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        np.testing.assert_allclose(slope, numeric, rtol=1e-7)


def test_adapt_is_the_plain_python_loop_of_each_user(task_batch, tiny_model):
    support, params = task_batch(mask=False).support, tiny_model.init(jax.random.key(0))
    optimizer = optax.sgd(0.3, momentum=0.5)
    fast = core.inner.adapt(tiny_model.apply, params, support, loss=squared, optimizer=optimizer, steps=4)
    for u in range(len(support.target)):
        own, state = params, optimizer.init(params)
        for _ in range(4):
            gradient = jax.grad(lambda p: squared(tiny_model.apply(p, support.features[u]), support.target[u]).mean())(
                own
            )
            updates, state = optimizer.update(gradient, state)
            own = optax.apply_updates(own, updates)
        for mine, theirs in zip(jax.tree.leaves(jax.tree.map(lambda w: w[u], fast)), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)


def test_padding_never_changes_the_meta_gradient(task_batch, tiny_model):
    task, params = task_batch(mask=False), tiny_model.init(jax.random.key(0))

    def pad(x, fill):
        more = np.full((x.shape[0], 3, *x.shape[2:]), fill, x.dtype)
        return np.concatenate([np.asarray(x), more], axis=1)

    def padded(e, fill):
        return Examples(pad(e.features, fill), pad(e.target, fill), pad(e.mask, 0))

    gradient = jax.jit(jax.grad(lambda p, t: meta_loss(tiny_model.apply, p, t, steps=2)))
    expected = gradient(params, task)
    for fill in (0.0, 7.0):
        more = Task(padded(task.support, fill), padded(task.query, fill))
        empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:2])]), more)  # two users without anything
        for changed in (more, empty):
            got = gradient(params, changed)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def test_a_user_without_support_keeps_the_shared_parameters_exactly(task_batch, tiny_model):
    support, params = task_batch().support, tiny_model.init(jax.random.key(0))
    support = support._replace(mask=np.asarray(support.mask) * (np.arange(len(support.mask)) != 2)[:, None])
    fast = core.inner.adapt(tiny_model.apply, params, support, optimizer=optax.adam(0.1), steps=3)
    jax.tree.map(lambda w, p: np.testing.assert_array_equal(w[2], p), fast, params)
    assert not np.allclose(fast["w1"][1], params["w1"])


def test_shared_leaves_are_never_copied_for_each_user(task_batch, tiny_model):
    support, params = task_batch().support, tiny_model.init(jax.random.key(0))
    chosen = {"w1": False, "b1": True, "w2": False, "b2": True}
    fast = core.inner.adapt(tiny_model.apply, params, support, adapted=chosen)
    assert fast["w1"] is None
    assert fast["w2"] is None
    assert fast["b1"].shape == (5, 4)
    assert core.inner.predict(tiny_model.apply, params, fast, support.features).shape == (5, 7)


def test_the_step_size_scales_updates_leaf_by_leaf(task_batch, tiny_model):
    support, params = task_batch().support, tiny_model.init(jax.random.key(0))
    one = core.inner.adapt(tiny_model.apply, params, support)
    scaled = core.inner.adapt(tiny_model.apply, params, support, step_size={"w1": 0.0, "b1": 2.0, "w2": 1.0, "b2": 1.0})
    jax.tree.map(
        lambda a, b, p, s: np.testing.assert_allclose(b - p, s * (a - p), atol=1e-6),
        one, scaled, params, {"w1": 0.0, "b1": 2.0, "w2": 1.0, "b2": 1.0},
    )  # fmt: skip


@pytest.mark.parametrize("bad", [{"steps": -1}, {"count": -1.0}, {"count": np.float32(-1)}, {"count": np.nan}])
def test_a_negative_number_of_steps_or_count_is_refused(bad, task_batch, tiny_model):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be 0 or more"):
        core.inner.adapt(tiny_model.apply, tiny_model.init(jax.random.key(0)), task_batch().support, **bad)
