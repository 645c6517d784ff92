"""Meta-SGD: MAML with a meta-learned inner step size for every single parameter."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import ALL, default_inner, from_inner_loop
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Params, PointwiseLoss

ALPHA = (0.005, 0.1)  # range of the random start of the step sizes, section 4.1 of the paper


def meta_sgd(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 1,
    first_order: bool = False,
    groups: Collection[str] = ALL,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """MAML whose step is learned in size and direction, with one factor per adapted parameter.

        w_u = theta - alpha * grad L_support(theta),   alpha = eta * (1 + a)   (elementwise)

    theta and a are meta-learned together; eta is the step of the inner optimiser. Training starts at a = 0, which is
    MAML, and alpha may become negative. Per-weight step sizes rule out low-rank fast weights: every user gets a full
    copy of the adapted weights in memory, tables included. `groups=("decision", "head")` shares the tables, as MeLU
    does.

    Args:
      model: `init` and `apply`; also `groups`, unless every parameter adapts.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps; the paper takes one.
      first_order: treat inner gradients as constants.
      groups: which groups of parameters adapt.
      count: see `maml`.
      faithful: learn alpha itself, as in eq. 2 of the paper. All its entries start at one number, drawn uniformly from
        [0.005, 0.1]. There is no `inner` and no `count`.

    Raises:
      ValueError: unknown groups, a model without `groups` where they are needed, or `faithful` with an `inner` or a
        `count`.

    Differs from the paper:
      The parameter is a, which starts at 0, where the paper learns a randomly initialised alpha itself
      (`faithful=True`). A weight penalty then shrinks towards MAML instead of towards no step.

    References:
      Li et al., Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017, eq. 2 and algorithm 1.
    """
    if faithful and (inner is not None or count != 0):
        raise ValueError("faithful=True learns the whole step: it takes neither an inner optimiser nor a count")
    inner = optax.sgd(1.0) if faithful else default_inner(loss) if inner is None else inner

    def learned(fast: Params) -> dict[str, Params]:
        return {"step_size": jax.tree.map(jnp.zeros_like, fast)}

    def options(params: Params) -> dict[str, Any]:
        size = params["step_size"] if faithful else jax.tree.map(lambda a: 1 + a, params["step_size"])
        return {
            "optimizer": inner,
            "steps": steps,
            "step_size": size,
            "first_order": first_order,
            "count": count,
            "form": "plain",
        }

    strategy = from_inner_loop(model, loss, groups, learned, options)

    def init(key: jax.Array) -> Params:
        init_key, alpha_key = jax.random.split(key)
        params = strategy.init(init_key)
        alpha = jax.random.uniform(alpha_key, (), minval=ALPHA[0], maxval=ALPHA[1])
        return params | {"step_size": jax.tree.map(lambda a: jnp.full_like(a, alpha), params["step_size"])}

    return strategy._replace(init=init) if faithful else strategy
