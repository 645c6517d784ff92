"""Reptile: move the shared parameters towards the result of ordinary training on each user."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import default_inner
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.strategies.wrappers.history import joined
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task


def reptile(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    count: float = 0.0,
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

    Differs from the paper:
      Every inner step uses all examples of the user; the paper draws a minibatch for each step.

    References:
      Nichol et al., On First-Order Meta-Learning Algorithms, 2018, Algorithm 2.
    """
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
        adapted = adapt(fixed, all_examples, key)
        value = core.query_loss(predict(fixed, adapted, all_examples.features), all_examples, loss)
        real = jnp.any(all_examples.mask > 0, axis=1)
        change = core.mean_change(fixed, adapted, real / jnp.maximum(real.sum(), 1))
        # <theta, mean_u (theta - w_u)> with the mean held constant: its gradient in theta is that mean
        surrogate = -sum(jax.tree.leaves(jax.tree.map(jnp.vdot, params, jax.lax.stop_gradient(change))))
        return value + surrogate - jax.lax.stop_gradient(surrogate), {"failed": adapted.failed.sum()}

    return Strategy(model.init, adapt, predict, meta_loss, outer="own")
