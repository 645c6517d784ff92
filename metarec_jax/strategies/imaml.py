"""iMAML: a proximal inner problem for each user, differentiated by the implicit function theorem."""

from collections.abc import Collection

import jax
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import ALL, curvature, from_adapt, leaves_of
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Params, PointwiseLoss


def imaml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    damping: float | None = None,
    steps: int = 16,
    iterations: int = 8,
    groups: Collection[str] = ALL,
    count: float = 0.0,
) -> Strategy:
    """Implicit MAML: a proximal inner problem, with the meta-gradient of its solution by the implicit function theorem.

        w_u = argmin_w L_support(w) + lambda / 2 |w - theta|^2,   dw_u/dtheta = (I + H / lambda)^-1

    Memory does not grow with the number of steps. The meta-gradient is correct only if the inner loop has converged,
    which the defaults ensure. With c the curvature of the loss (1/4 for the logistic loss, 2 for the squared error),
    lambda = 4c and heavy-ball steps of 0.04 / c with momentum 1/2 shrink the error by 0.71 per step, to less than a
    hundredth in 16 steps. This holds in all directions in which the mean support loss has a curvature below 69 c.

    Args:
      model: `init` and `apply`; also `groups`, unless every parameter adapts.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation.
      damping: lambda.
      steps: inner steps.
      iterations: iterations of conjugate gradients.
      groups: which groups of parameters adapt.
      count: see `maml`.

    Raises:
      ValueError: `damping`, `steps` or `iterations` out of range; unknown groups, or a model without `groups` where
        they are needed.

    References:
      Rajeswaran et al., Meta-Learning with Implicit Gradients, NeurIPS 2019, eq. 3 and 6, algorithm 2.
    """
    curve = curvature(loss) or 0.25
    inner = optax.sgd(0.04 / curve, momentum=0.5) if inner is None else inner
    damping = 4 * curve if damping is None else damping
    if damping <= 0 or steps < 1 or iterations < 1:
        raise ValueError(
            f"damping must be more than 0, steps and iterations 1 or more; got {damping=}, {steps=}, {iterations=}"
        )
    adapted_leaves = leaves_of(model, groups)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return core.implicit.adapt(
            model.apply,
            params["model"],
            support,
            damping=damping,
            loss=loss,
            optimizer=inner,
            steps=steps,
            adapted=adapted_leaves(params["model"]),
            iterations=iterations,
            count=count,
        )

    return from_adapt(model, loss, lambda key: {"model": model.init(key)}, adapt)
