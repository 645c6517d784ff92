"""Reptile: move the shared parameters towards the result of ordinary training on each user."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import default_inner, learns_step_size
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.strategies.wrappers.history import joined
from metarec_jax.types import Apply, Examples, Features, Params, PointwiseLoss, Task, mean_loss


def reptile(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    count: float = 0.0,
    minibatch: int = 10,
    faithful: bool = False,
) -> Strategy:
    """First-order meta-learning without a query set.

        meta-gradient = mean_u (theta - w_u),   w_u = theta after `steps` inner steps on all examples of user u

    The gradient of `Strategy.loss` is this meta-gradient, so Reptile trains with any outer optimiser like every other
    strategy; the value of the loss is the users' mean loss at w_u. The meta-gradient is about `steps` times the inner
    step size as long as a gradient of the loss, so a penalty in the outer optimiser has more effect than in other
    strategies.

    Args:
      model: `init` and `apply`.
      loss: elementwise loss of scores and targets.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps.
      count: see `maml`.
      minibatch: examples of an inner step, if `faithful`.
      faithful: draw a minibatch of the user's examples, without replacement, for each inner step of meta-training, as
        in U_k of Algorithm 2. A new user adapts to the whole support set; without one, the shared model answers.

    Raises:
      ValueError: `minibatch` is less than 1, or `faithful` with a `count`.

    Differs from the paper:
      Every inner step uses all examples of the user; the paper draws a minibatch for each step (`faithful=True`).

    References:
      Nichol et al., On First-Order Meta-Learning Algorithms, 2018, Algorithm 2.
    """
    if minibatch < 1:
        raise ValueError(f"minibatch must be 1 or more, got {minibatch}")
    learns_step_size(faithful, None, count)  # refuse a count
    inner, as_constants = default_inner(loss) if inner is None else inner, as_truth(loss)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return core.adapt(
            model.apply, params, support, loss=loss, optimizer=inner, steps=steps, first_order=True, count=count
        )

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return core.predict(model.apply, params, adapted, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        all_examples = joined(task._replace(support=as_constants(task.support)))
        fixed = jax.lax.stop_gradient(params)
        real = jnp.any(all_examples.mask > 0, axis=1)
        share = real / jnp.maximum(real.sum(), 1)
        if faithful:
            own, failed = by_minibatches(model.apply, fixed, all_examples, key, loss, inner, steps, minibatch)
            scores = core.inner.predict(model.apply, fixed, own, all_examples.features)
            change = jax.tree.map(lambda w, theta: jnp.tensordot(share.astype(w.dtype), w - theta, 1), own, fixed)
        else:
            adapted = adapt(fixed, all_examples, key)
            scores, failed = predict(fixed, adapted, all_examples.features), adapted.failed
            change = core.mean_change(fixed, adapted, share)
        value = core.query_loss(scores, all_examples, loss)
        # <theta, mean_u (theta - w_u)> with the mean held constant: its gradient in theta is that mean
        surrogate = -sum(jax.tree.leaves(jax.tree.map(jnp.vdot, params, jax.lax.stop_gradient(change))))
        return value + surrogate - jax.lax.stop_gradient(surrogate), {"failed": failed.sum()}

    return Strategy(model.init, adapt, predict, meta_loss, outer="own")


def by_minibatches(
    apply: Apply,
    params: Params,
    examples: Examples,
    key: jax.Array,
    loss: PointwiseLoss,
    inner: optax.GradientTransformation,
    steps: int,
    size: int,
) -> tuple[Params, jax.Array]:
    """Take `steps` optimiser steps for each user, each on up to `size` examples drawn without replacement.

    Returns:
      Each user's weights, a pytree of `[users, ...]`, and which users `[users]` met a non-finite number and kept
      `params`.
    """

    def one_user(user: Examples, key: jax.Array) -> tuple[Params, jax.Array]:
        real = user.mask > 0
        index = jnp.cumsum(real)  # counts real examples, so that padding does not change the draw

        def step(carry: tuple[Params, Any], key: jax.Array) -> tuple[tuple[Params, Any], None]:
            weights, state = carry
            order = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)
            order = jnp.where(real, order, 2.0)
            rank = (order[:, None] > order).sum(1)
            batch = user._replace(mask=jnp.where(rank < size, user.mask, 0))
            slope = jax.grad(lambda w: mean_loss(loss, apply(w, user.features), batch))(weights)
            updates, state = inner.update(slope, state, weights)
            updates = jax.tree.map(lambda u: jnp.where(jnp.any(real), u, 0.0), updates)
            return (optax.apply_updates(weights, updates), state), None

        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(steps))
        (weights, _), _ = jax.lax.scan(step, (params, inner.init(params)), keys)
        failed = ~jnp.stack([jnp.isfinite(w).all() for w in jax.tree.leaves(weights)]).all()
        return jax.tree.map(lambda w, theta: jnp.where(failed, theta, w), weights, params), failed

    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(examples.mask)))
    return jax.vmap(one_user)(examples, keys)
