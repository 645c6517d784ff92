"""MAML++: a learned step size for each array and inner step, and a meta-loss over all inner steps."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import ALL, default_inner, from_inner_loop
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Params, PointwiseLoss, Task


def mamlpp(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 3,
    multi_step: float = 0.1,
    groups: Collection[str] = ALL,
    count: float = 0.0,
) -> Strategy:
    """MAML with two stabilisers: learned step sizes per array and step, and the multi-step loss.

        w_0 = theta;   w_{k+1} = w_k - alpha_k * grad L_support(w_k),   alpha_k = eta * exp(a_k) for each array
        meta-loss = (1 - s) L_query(w_K) + s / (K - 1) * sum_{0 < k < K} L_query(w_k)

    s is `multi_step`. If s > 0, the loss of each earlier step reruns the inner loop: K (K + 1) / 2 steps in all.

    Args:
      model: `init` and `apply`; also `groups`, unless every parameter adapts.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation, whose updates alpha_k / eta multiplies (default
        `default_inner(loss)`).
      steps: inner steps K.
      multi_step: share s of the steps before the last in the meta-loss, 0 to less than 1.
      groups: which groups of parameters adapt.
      count: see `maml`.

    Raises:
      ValueError: `steps` or `multi_step` out of range; unknown groups, or a model without `groups` where they are
        needed.

    Differs from the paper:
      - s is constant, because a strategy does not know the epoch; the paper anneals it to 0 over the epochs.
      - The meta-gradient is of second order throughout; the paper starts with first-order epochs.
      - Annealing the outer learning rate is left to the outer optimiser.
      - There is no per-step batch normalisation.
      - There is no `faithful` form: both schedules need the epoch, and the networks have no batch normalisation.

    References:
      Antoniou et al., How to Train Your MAML, ICLR 2019, section 4: multi-step loss optimization, and learning
      per-layer per-step learning rates.
    """
    if steps < 1 or not 0 <= multi_step < 1:
        raise ValueError(f"need steps >= 1 and 0 <= multi_step < 1, got {steps=}, {multi_step=}")
    inner = default_inner(loss) if inner is None else inner

    def learned(fast: Params) -> dict[str, Params]:
        return {"log_step_size": jax.tree.map(lambda _: jnp.zeros(steps), fast)}

    def strategy_after(k: int) -> Strategy:
        def options(params: Params) -> dict[str, Any]:
            rates = scale_by_step(jax.tree.map(jnp.exp, params["log_step_size"]))
            return {"optimizer": optax.chain(inner, rates), "steps": k, "count": count}

        return from_inner_loop(model, loss, groups, learned, options)

    *earlier, last = [strategy_after(k) for k in range(1, steps + 1)]

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, aux = last.loss(params, task, key)
        if multi_step == 0 or not earlier:
            return value, aux
        mean = sum(strategy.loss(params, task, key)[0] for strategy in earlier) / len(earlier)
        return (1 - multi_step) * value + multi_step * mean, aux

    return last._replace(loss=meta_loss)


def scale_by_step(rates: Params) -> optax.GradientTransformation:
    """Multiply each array's k-th update by `rates[k]`, which may be learned.

    Args:
      rates: a pytree like the updates, `[steps]` for each array.
    """

    def update(updates: Params, step: jax.Array, params: Params = None) -> tuple[Params, jax.Array]:
        return jax.tree.map(lambda rate, u: rate[step] * u, rates, updates), step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
