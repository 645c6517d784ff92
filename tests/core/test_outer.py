"""The outer loop: how users are weighed, and that a meta-step is plain gradient descent on the meta-loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import core
from metarec_jax.types import Examples


def test_query_loss_is_the_mean_over_users_of_each_users_mean():
    scores = jnp.array([[1.0, 2.0, 9.0], [3.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    query = Examples(jnp.zeros((3, 3)), jnp.zeros((3, 3)), mask)
    value = core.query_loss(scores, query, lambda s, t: s - t)
    np.testing.assert_allclose(value, ((1 + 2) / 2 + 3) / 2)


def test_values_under_the_mask_cannot_reach_the_gradient_even_when_not_finite():
    query = Examples(jnp.zeros((1, 2)), jnp.array([[0.0, jnp.nan]]), jnp.array([[1.0, 0.0]]))
    gradient = jax.grad(lambda s: core.query_loss(s, query, lambda s, t: (s - t) ** 2))(jnp.array([[2.0, 1.0]]))
    np.testing.assert_allclose(gradient, [[4.0, 0.0]])


def test_a_meta_step_is_one_optimizer_step_on_the_meta_loss(task_batch, tiny_model):
    task = task_batch()

    def loss(params, task, key):
        scores = jax.vmap(tiny_model.apply, (None, 0))(params, task.query.features)
        return core.query_loss(scores, task.query, optax.losses.squared_error), {"scores": scores.mean()}

    params, optimizer = tiny_model.init(jax.random.key(0)), optax.sgd(0.1)
    step = core.meta_step(loss, optimizer)
    moved, _, aux = step(params, optimizer.init(params), task, jax.random.key(0))
    gradient = jax.grad(lambda p: loss(p, task, None)[0])(params)
    jax.tree.map(lambda m, p, g: np.testing.assert_allclose(m, p - 0.1 * g, rtol=1e-6), moved, params, gradient)
    np.testing.assert_allclose(aux["loss"], loss(params, task, None)[0], rtol=1e-6)
    assert set(aux) == {"loss", "scores"}

    in_chunks = core.meta_step(loss, optimizer, chunk=2)
    same, _, parts = in_chunks(params, optimizer.init(params), task, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), same, moved)
    np.testing.assert_allclose(parts["loss"], aux["loss"], rtol=1e-6)
