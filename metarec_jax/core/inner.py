"""The inner loop in plain form: adapt shared parameters to each user by differentiable optimiser steps.

`vmap` over users of `grad` of a user's support loss: the reference implementation for faster engines. Only the adapted
("fast") leaves get a users axis; shared parameters are not copied.
"""

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.types import Apply, Examples, Features, Params, PointwiseLoss, mean_loss


def check_count(count: float | jax.Array) -> None:
    """Validate `count`: a finite number, 0 or more. Arrays are not checked, since they may be traced."""
    if isinstance(count, jax.Array | np.ndarray):
        return
    if not isinstance(count, Real) or not 0 <= count < float("inf"):
        raise ValueError(f"count must be 0 or more and finite, got {count!r}")


def partition(params: Params, mask: Params) -> Params:
    """Select the leaves of `params` where `mask` is True; the others become None.

    Args:
      params: a pytree.
      mask: a pytree of bools like `params`, or a prefix of one.

    Raises:
      ValueError: a leaf of `mask` is not a bool.

    Example:
      >>> mr.core.partition({"embedding": 1.0, "head": {"w": 2.0, "b": 3.0}}, {"embedding": False, "head": True})
      {'embedding': None, 'head': {'w': 2.0, 'b': 3.0}}
    """
    for flag in jax.tree.leaves(mask):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(
                f"the mask of adapted parameters must hold bools, one for each leaf or subtree; got {flag!r}"
            )
    return jax.tree.map(lambda keep, sub: sub if keep else jax.tree.map(lambda _: None, sub), mask, params)


def merge(fast: Params, params: Params) -> Params:
    """Replace leaves of `params` by those of `fast`; where `fast` is None the shared leaf stays.

    Example:
      >>> mr.core.merge({"embedding": None, "head": 5.0}, {"embedding": 1.0, "head": 2.0})
      {'embedding': 1.0, 'head': 5.0}
    """
    return jax.tree.map(lambda f, p: p if f is None else f, fast, params, is_leaf=lambda x: x is None)


def adapt(
    apply: Apply,
    params: Params,
    support: Examples,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 1,
    adapted: Params = True,
    step_size: Params = 1.0,
    first_order: bool = False,
    count: float | jax.Array = 0.0,
) -> Params:
    """Compute each user's fast weights by `steps` optimiser steps on the support loss (MAML, eq. 1).

        w_0 = params;  w_{k+1} = w_k + step_size * optimizer(grad L_support(w_k))

    Differentiable in `params` and `step_size` to second order; `first_order=True` treats the inner gradients as
    constants (FOMAML). A user without support examples keeps the shared parameters exactly.

    Args:
      apply: `apply(params, features) -> scores`, for one user: features `[examples, ...]`, scores `[examples]`.
      params: shared parameters, a pytree.
      support: support set, arrays `[users, examples, ...]`.
      loss: elementwise loss of scores and targets; its weighted mean over a user's support is minimised.
      optimizer: any optax transformation (default `optax.sgd(0.1)`); its state is initialised for each user.
      steps: number of inner steps.
      adapted: which leaves adapt: a pytree of Python bools, or a prefix of one (True: all of them).
      step_size: multiplies the optimiser's updates; a scalar or array, or a pytree prefix of the adapted leaves.
        Make it a parameter to meta-learn it (Meta-SGD, Li et al., 2017).
      first_order: drop the second-order terms of the meta-gradient.
      count: pseudo-count in the denominator of the support mean, 0 or more; 0 is the published mean. It shrinks the
        steps of users with few examples, as a posterior mean does. It has little effect on optimisers whose steps do
        not depend on the gradient's scale, such as Adam.

    Returns:
      A pytree like `params`: `[users, ...]` where a leaf is adapted, None where it is shared. Pass it to `predict`.

    Raises:
      ValueError: `steps` or `count` is negative.

    Example:
      As in `fastweights.adapt`: a step of 0.1 along the gradient -4 moves w from 0 to 0.4.

      >>> support = mr.Examples(jnp.ones((1, 1)), jnp.array([[2.0]]), jnp.ones((1, 1)))  # one user, one example
      >>> mr.core.inner.adapt(lambda w, x: w * x, jnp.zeros(()), support)
      Array([0.4], dtype=float32)

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    check_count(count)
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    start = partition(params, adapted)

    def support_loss(fast: Params, user: Examples) -> jax.Array:
        return mean_loss(loss, apply(merge(fast, params), user.features), user, count)

    def adapt_user(user: Examples) -> Params:
        present = jnp.any(user.mask > 0)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            fast, state = carry
            gradient = jax.grad(support_loss)(fast, user)
            if first_order:
                gradient = jax.lax.stop_gradient(gradient)
            updates, state = optimizer.update(gradient, state, fast)
            scaled = _scale(step_size, updates)
            fast = jax.tree.map(lambda w, u: w + jnp.where(present, u, 0.0).astype(w.dtype), fast, scaled)
            return (fast, state), None

        (fast, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
        return fast

    return jax.vmap(adapt_user)(support)


def predict(apply: Apply, params: Params, fast: Params, features: Features) -> jax.Array:
    """Score examples with each user's adapted model.

    Args:
      apply, params: as given to `adapt`.
      fast: the result of `adapt`.
      features: `[users, examples, ...]`.

    Returns:
      Scores `[users, examples]`.

    Example:
      >>> mr.core.inner.predict(lambda w, x: w * x, jnp.zeros(()), jnp.array([2.0, 3.0]), jnp.ones((2, 1)))
      Array([[2.],
             [3.]], dtype=float32)
    """
    return jax.vmap(lambda w, x: apply(merge(w, params), x))(fast, features)


def _scale(step_size: Params, updates: Params) -> Params:
    """Compute `step_size * updates`, where `step_size` is a pytree prefix of `updates`."""
    return jax.tree.map(
        lambda s, sub: None if sub is None else jax.tree.map(lambda u: s * u, sub),
        step_size,
        updates,
        is_leaf=lambda x: x is None,
    )
