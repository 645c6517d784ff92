"""The inner loop: adapt shared parameters to each user by a few differentiable optimiser steps.

This is the plain form, `vmap` over users of `grad` over a user's support loss. It is the reference that faster
engines are compared with. Parameters that every user shares are never copied: only the adapted ("fast") leaves get a
users axis.
"""

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.types import Apply, Examples, Features, Params, PointwiseLoss, mean_loss


def check_count(count: float | jax.Array) -> None:
    """Refuses a number of examples that is none; an array, which may be traced, is taken as it is."""
    if isinstance(count, jax.Array | np.ndarray):
        return
    if not isinstance(count, Real) or not 0 <= count < float("inf"):
        raise ValueError(f"count must be 0 or more examples, got {count!r}")


def partition(params: Params, mask: Params) -> Params:
    """The leaves of `params` where `mask` (a pytree of bools, or a prefix of one) is True; None elsewhere."""
    for flag in jax.tree.leaves(mask):
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(
                f"what adapts is said by bools, one for each leaf or subtree of the parameters; got {flag!r}"
            )
    return jax.tree.map(lambda keep, sub: sub if keep else jax.tree.map(lambda _: None, sub), mask, params)


def merge(fast: Params, params: Params) -> Params:
    """`params` with every leaf that `fast` has replaced; where `fast` has None the shared leaf stays."""
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
    """Fast weights of each user after `steps` optimiser steps on that user's support loss (MAML, eq. 1).

        w_0 = params;  w_{k+1} = w_k + step_size * optimizer(grad L_support(w_k))

    Differentiable in `params` and `step_size` to second order; `first_order=True` treats the inner gradients as
    constants (FOMAML). A user with no support example keeps the shared parameters, exactly.

    Args:
      apply: `apply(params, features) -> scores`, for one user: features `[examples, ...]`, scores `[examples]`.
      params: shared parameters, a pytree.
      support: `[users, examples, ...]` what each user adapts to.
      loss: elementwise loss of scores and targets; its mean over a user's real examples is minimised.
      optimizer: any optax transformation (default `optax.sgd(0.1)`); its state starts anew for each user.
      steps: number of inner steps.
      adapted: which leaves adapt: a pytree of Python bools, or a prefix of one (True: all of them).
      step_size: multiplies the optimiser's updates; a scalar or array, or a pytree prefix of the adapted leaves.
        Make it a parameter to meta-learn it (Meta-SGD, Li et al., 2017).
      first_order: drop the second-order terms of the meta-gradient.
      count: adds to the number of a user's examples in that mean, as so many more whose loss nothing changes: with few
        real ones a user moves less, as a posterior mean does, unless the optimiser's steps do not depend on the size of
        the gradient, as Adam's. 0 or more; 0 is the published mean.

    Returns:
      A pytree like `params`: `[users, ...]` where a leaf is adapted, None where it is shared. Read it with `predict`.

    Raises:
      ValueError: for a negative number of steps or count.

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
    """Scores `[users, examples]` of each user's adapted model on `features` `[users, examples, ...]`."""
    return jax.vmap(lambda w, x: apply(merge(w, params), x))(fast, features)


def _scale(step_size: Params, updates: Params) -> Params:
    """`step_size * updates`, where `step_size` is a prefix of `updates`."""
    return jax.tree.map(
        lambda s, sub: None if sub is None else jax.tree.map(lambda u: s * u, sub),
        step_size,
        updates,
        is_leaf=lambda x: x is None,
    )
