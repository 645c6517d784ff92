"""Batched symmetric positive definite systems by products of matrices.

Batched LAPACK calls are avoided: two at once can deadlock the thread pool of jaxlib 0.10.2 on a CPU (jax-ml/jax#39292
is another failure of batched LAPACK calls on that pool).
"""

import jax
import jax.numpy as jnp


def solve(matrix: jax.Array, right: jax.Array, steps: int = 24) -> jax.Array:
    """Solve `matrix @ x = right` for each user by conjugate gradients with a Jacobi preconditioner.

    Uses matrix products only, for a fixed number of steps. Differentiable in both arguments by the implicit function
    theorem.

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


@jax.custom_jvp
def inverse_cholesky(matrix: jax.Array) -> jax.Array:
    """Return C = L^-1 of symmetric positive definite matrices `[..., n, n]` = L L', so that C' C is the inverse.

    It uses products only: C <- C (2 I - L C) from C = diag(L)^-1. The error I - L C is strictly triangular and is
    squared in each iteration, so log2(n) iterations are exact. The derivative, dC = -Phi(C dA C') C with Phi the lower
    triangle and half the diagonal, uses products too.

    References:
      Murray, Differentiation of the Cholesky decomposition, 2016, equation 8.
    """
    factor = jnp.linalg.cholesky(matrix)
    n = matrix.shape[-1]
    identity = jnp.eye(n, dtype=matrix.dtype)
    root = identity / jnp.diagonal(factor, axis1=-2, axis2=-1)[..., None, :]
    return jax.lax.fori_loop(0, (n - 1).bit_length(), lambda _, root: root @ (2 * identity - factor @ root), root)


@inverse_cholesky.defjvp
def _inverse_cholesky_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (matrix,), (change,) = primals, tangents
    root = inverse_cholesky(matrix)
    inside = root @ change @ jnp.swapaxes(root, -1, -2)
    n = matrix.shape[-1]
    phi = jnp.tril(inside) * (1 - 0.5 * jnp.eye(n, dtype=matrix.dtype))
    return root, -phi @ root


def normal_per_key(keys: jax.Array, size: int) -> jax.Array:
    """Draw standard normal vectors `[users, size]`, one for each key of `keys` `[users]`."""
    return jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)
