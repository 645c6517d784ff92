"""The implicit meta-gradient is that of the exact inner minimum: closed forms, and MAML at convergence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax.core import fastweights, implicit, inner, outer
from metarec_jax.types import Examples, Task

USERS, SUPPORT, QUERY, INPUTS, ITEMS, DAMPING = 3, 5, 4, 3, 6, 3.0


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def examples(seed: int, rows: int) -> Examples:
    r = np.random.default_rng(seed)
    features = {
        "x": jnp.asarray(r.standard_normal((USERS, rows, INPUTS)), jnp.float32),
        "item": jnp.asarray(r.integers(0, ITEMS, (USERS, rows)), jnp.int32),
    }
    mask = (r.random((USERS, rows)) < 0.8).astype(np.float32)
    mask[:, 0] = 1
    return Examples(features, jnp.asarray(r.standard_normal((USERS, rows)), jnp.float32), jnp.asarray(mask))


TASK = Task(examples(0, SUPPORT), examples(1, QUERY))


def linear(params, features):
    return (features["x"] @ params["w"])[:, 0]


def network(params, features):
    h = features["x"] + params["table"][features["item"]] + params["shift"]
    h = jnp.tanh(h @ params["w0"] + params["b"])
    return jnp.tanh(h @ params["w1"]).sum(-1)


def network_params():
    r = np.random.default_rng(2)
    shapes = {"table": (ITEMS, INPUTS), "shift": (INPUTS,), "w0": (INPUTS, 4), "b": (4,), "w1": (4, 2)}
    return {name: jnp.asarray(r.standard_normal(shape) / 2, jnp.float32) for name, shape in shapes.items()}


def meta_loss(apply, params, task, **options):
    adapted = implicit.adapt(apply, params, task.support, damping=DAMPING, **options)
    scores = fastweights.predict(apply, params, adapted, task.query.features)
    return outer.query_loss(scores, task.query, optax.losses.squared_error)


def assert_close(a, b, tolerance):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    assert np.abs(a - b).max() < tolerance * np.abs(b).max()


@pytest.mark.parametrize(("form", "count"), [("dual", 0.0), ("plain", 0.0), ("dual", 3.0)])
def test_linear_regression_has_the_gradient_of_the_closed_form(form, count):
    def closed(params, task):
        def user(x, y, mask):
            n = mask.sum() + count
            gram = 2 * (x * mask[:, None]).T @ x / n + DAMPING * jnp.eye(INPUTS)
            return jnp.linalg.solve(gram, 2 * (x * mask[:, None]).T @ y[:, None] / n + DAMPING * params["w"])

        w = jax.vmap(user)(task.support.features["x"], task.support.target, task.support.mask)
        scores = (task.query.features["x"] @ w)[..., 0]
        return outer.query_loss(scores, task.query, optax.losses.squared_error)

    params = {"w": jnp.ones((INPUTS, 1))}
    found = jax.jit(jax.value_and_grad(partial(meta_loss, linear, steps=80, form=form, count=count)))(params, TASK)
    assert_close(found, jax.jit(jax.value_and_grad(closed))(params, TASK), 1e-4)


def test_the_gradient_reaches_support_targets_and_weights():
    """As that of MAML at convergence does; labels and weights of support examples are learned through it."""
    params = {"w": jnp.asarray(np.random.default_rng(3).standard_normal((INPUTS, 1)), jnp.float32)}

    def solved(target, mask):
        support = TASK.support._replace(target=target, mask=mask)
        return meta_loss(linear, params, Task(support, TASK.query), steps=400, optimizer=optax.sgd(0.1))

    def unrolled(target, mask):
        support = TASK.support._replace(target=target, mask=mask)

        def one(x, y, weight):
            def inner_loss(w):
                fit = (weight * jnp.square((x @ w)[:, 0] - y)).sum() / weight.sum()
                return fit + DAMPING / 2 * jnp.square(w - params["w"]).sum()

            return jax.lax.fori_loop(0, 400, lambda _, w: w - 0.1 * jax.grad(inner_loss)(w), params["w"])

        w = jax.vmap(one)(support.features["x"], target, mask)
        scores = (TASK.query.features["x"] @ w)[..., 0]
        return outer.query_loss(scores, TASK.query, optax.losses.squared_error)

    target, mask = TASK.support.target, jnp.where(TASK.support.mask > 0, 0.7, 0.0)
    found, expected = (jax.grad(loss, (0, 1))(target, mask) for loss in (solved, unrolled))
    real = mask > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(jnp.where(real, mine, 0), jnp.where(real, theirs, 0), 1e-3)
        assert np.abs(np.asarray(mine)).max() > 1e-3


def test_the_gradient_is_that_of_maml_run_to_convergence_shared_leaves_included():
    mask = {"table": True, "shift": False, "w0": True, "b": True, "w1": True}

    def unrolled(params, task):
        pulled = implicit.proximal(optax.sgd(0.2), DAMPING)
        fast = inner.adapt(network, params, task.support, optimizer=pulled, steps=80, adapted=mask)
        scores = inner.predict(network, params, fast, task.query.features)
        return outer.query_loss(scores, task.query, optax.losses.squared_error)

    options = {"optimizer": optax.sgd(0.2), "steps": 80, "adapted": mask, "iterations": 12, "form": "dual"}
    params = network_params()
    found = jax.jit(jax.value_and_grad(partial(meta_loss, network, **options)))(params, TASK)
    assert_close(found, jax.jit(jax.value_and_grad(unrolled))(params, TASK), 1e-3)


def test_users_without_support_or_with_bad_numbers_pass_the_gradient_straight_through():
    params = {"w": jnp.ones((INPUTS, 1))}
    gradient = jax.jit(jax.value_and_grad(partial(meta_loss, linear, steps=20, form="dual")))
    empty = TASK.support._replace(mask=TASK.support.mask.at[1].set(0))
    bad = TASK.support._replace(target=TASK.support.target.at[1, 0].set(jnp.inf))
    found = gradient(params, TASK._replace(support=empty))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))
    assert_close(gradient(params, TASK._replace(support=bad)), found, 1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="damping must be more than 0"):
        implicit.adapt(linear, {"w": jnp.ones((INPUTS, 1))}, TASK.support, damping=0.0)
    with pytest.raises(ValueError, match="iterations 0 or more"):
        implicit.adapt(linear, {"w": jnp.ones((INPUTS, 1))}, TASK.support, iterations=-1)


def test_a_user_with_bad_features_leaves_a_shared_layer_below_alone():
    params, options = (
        network_params(),
        {"adapted": {"table": False, "shift": False, "w0": False, "b": False, "w1": True}},
    )
    x = TASK.support.features["x"].at[1, 0, 0].set(jnp.nan)
    bad = TASK._replace(support=TASK.support._replace(features={**TASK.support.features, "x": x}))
    gradient = jax.jit(jax.grad(partial(meta_loss, network, steps=5, form="dual", **options)))(params, bad)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))
