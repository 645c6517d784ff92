"""Conjugate gradients are the exact solution: numpy in float64, closed-form gradients, finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.core.solve import solve

USERS = 4


def system(n, condition=10.0, columns=None, seed=0):
    """Random symmetric positive definite matrices with these condition numbers, and right sides, in float64."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(USERS, n, n)))[0]
    matrix = basis * np.geomspace(1, condition, n)[None, None] @ basis.swapaxes(1, 2)
    shape = (USERS, n) if columns is None else (USERS, n, columns)
    return (matrix + matrix.swapaxes(1, 2)) / 2, rng.normal(size=shape)


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_solution_equals_numpy_in_float64(n, columns):
    matrix, right = system(n, columns=columns)
    expected = np.linalg.solve(matrix, right if columns else right[..., None])
    with jax.enable_x64(True):
        found = solve(jnp.asarray(matrix), jnp.asarray(right))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected if columns else expected[..., 0], rtol=1e-9, atol=1e-11)


def test_columns_are_solved_as_if_each_were_alone():
    matrix, right = system(6, columns=4)
    matrix, right = jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32)
    together = solve(matrix, right)
    for column in range(4):
        np.testing.assert_allclose(together[..., column], solve(matrix, right[..., column]), rtol=1e-5, atol=1e-6)


def test_users_do_not_influence_each_other():
    matrix, right = system(5)
    matrix, right = jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32)
    together = solve(matrix, right)
    for u in range(USERS):
        np.testing.assert_allclose(solve(matrix[u : u + 1], right[u : u + 1])[0], together[u], rtol=1e-5, atol=1e-6)


def test_gradients_have_their_closed_form():
    """Of L = g . x: dL/db = A^-1 g, dL/dA = -(A^-1 g) x'."""
    matrix, right = system(5, columns=2)
    cotangent = np.random.default_rng(1).normal(size=right.shape)
    with jax.enable_x64(True):
        inputs = jnp.asarray(matrix), jnp.asarray(right)
        of_matrix, of_right = jax.grad(lambda a, b: (cotangent * solve(a, b)).sum(), (0, 1))(*inputs)
    adjoint, x = np.linalg.solve(matrix, cotangent), np.linalg.solve(matrix, right)
    np.testing.assert_allclose(of_right, adjoint, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(of_matrix, -adjoint @ x.swapaxes(1, 2), rtol=1e-8, atol=1e-10)


def test_gradients_equal_finite_differences():
    """Of a matrix and a right side that both depend on one number, as ridge regression's do on its penalty."""
    matrix, right = system(6)

    def value(log_penalty):
        found = solve(jnp.asarray(matrix) + jnp.exp(log_penalty) * jnp.eye(6), jnp.asarray(right) * log_penalty)
        return jnp.square(found).sum()

    with jax.enable_x64(True):
        gradient = jax.grad(value)(0.3)
        expected = (value(0.3 + 1e-5) - value(0.3 - 1e-5)) / 2e-5
        forward = jax.jvp(value, (0.3,), (1.0,))[1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(forward, expected, rtol=1e-6)


@pytest.mark.parametrize(("weight", "steps", "tolerance"), [(0.3, 24, 1e-3), (10.0, 64, 1e-3), (100.0, 128, 1e-2)])
def test_float32_is_within_its_rounding_of_ill_conditioned_systems(weight, steps, tolerance):
    """As of a user's vector, 12 examples beside a prior; with condition numbers of 70 to 20,000."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=(USERS, 12, 64))
    matrix = weight * v.swapaxes(1, 2) @ v + np.eye(64) * np.linspace(0.5, 2, 64)
    right = weight * (v.swapaxes(1, 2) @ rng.normal(size=(USERS, 12, 1)))[..., 0]
    assert np.linalg.cond(matrix).min() > 100 * weight
    expected = np.linalg.solve(matrix, right[..., None])[..., 0]
    found = np.asarray(solve(jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32), steps))
    assert (np.linalg.norm(found - expected, axis=1) < tolerance * np.linalg.norm(expected, axis=1)).all()


def test_as_many_steps_as_clusters_of_eigenvalues_are_enough():
    """Twelve large eigenvalues and one that 52 unknowns share: 13 clusters."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(USERS, 64, 64)))[0]
    matrix = basis * np.append(np.geomspace(10, 100, 12), np.ones(52)) @ basis.swapaxes(1, 2)
    right = rng.normal(size=(USERS, 64))
    with jax.enable_x64(True):
        found = np.asarray(solve(jnp.asarray(matrix), jnp.asarray(right), 24))
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right[..., None])[..., 0], atol=1e-3)


def test_different_scales_of_the_unknowns_cost_no_steps():
    matrix, right = system(8)
    scale = np.geomspace(1e-3, 1e3, 8)
    scaled = matrix * scale[:, None] * scale
    found = np.asarray(solve(jnp.asarray(scaled, jnp.float32), jnp.asarray(right * scale, jnp.float32)))
    np.testing.assert_allclose(found * scale, np.linalg.solve(matrix, right[..., None])[..., 0], rtol=1e-3, atol=1e-4)


def test_a_right_side_of_zeros_and_padding_users_give_zeros_and_finite_gradients():
    matrix = jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])
    value, gradients = jax.value_and_grad(lambda a, b: jnp.square(solve(a, b)).sum(), (0, 1))(matrix, jnp.zeros((2, 3)))
    assert value == 0
    assert all(np.isfinite(g).all() for g in gradients)
