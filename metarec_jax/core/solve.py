"""Batched conjugate gradients for symmetric positive definite systems."""

import jax
import jax.numpy as jnp


def solve(matrix: jax.Array, right: jax.Array, steps: int = 24) -> jax.Array:
    """Solve `matrix @ x = right` for each user by conjugate gradients with a Jacobi preconditioner.

    Uses matrix products only, for a fixed number of steps. Differentiable in both arguments by the implicit function
    theorem. Batched LAPACK factorisations are not used: two at once can deadlock the CPU thread pool of jaxlib 0.10.2.

    Args:
      matrix: `[users, n, n]`, symmetric positive definite.
      right: `[users, n]` or `[users, n, columns]`.
      steps: number of iterations; choose more than the number of eigenvalue clusters. `n` steps are exact up to
        rounding.

    Returns:
      x, of the shape of `right`.

    References:
      Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952.
    """
    if right.ndim == 2:
        return solve(matrix, right[..., None], steps)[..., 0]
    scale = jax.lax.stop_gradient(1 / jnp.diagonal(matrix, axis1=-2, axis2=-1)[..., None])

    def product(x: jax.Array) -> jax.Array:
        return matrix @ x

    def conjugate_gradients(_: object, right: jax.Array) -> jax.Array:
        def step(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x, residual, direction, size = state
            image = product(direction)
            length = size / jnp.maximum((direction * image).sum(-2, keepdims=True), 1e-30)
            x, residual = x + length * direction, residual - length * image
            scaled = scale * residual
            new = (residual * scaled).sum(-2, keepdims=True)
            return x, residual, scaled + new / jnp.maximum(size, 1e-30) * direction, new

        first = scale * right
        start = (jnp.zeros_like(right), right, first, (right * first).sum(-2, keepdims=True))
        return jax.lax.fori_loop(0, steps, step, start)[0]

    return jax.lax.custom_linear_solve(product, right, conjugate_gradients, symmetric=True)
