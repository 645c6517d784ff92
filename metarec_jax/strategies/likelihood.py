"""Likelihood: which distribution of the target given its score a loss is the negative logarithm of."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.types import Examples, PointwiseLoss


def likelihood(loss: PointwiseLoss) -> Literal["bernoulli", "gaussian"] | None:
    """That of the logistic loss is "bernoulli", of any multiple of the squared error "gaussian", of others None.

    They are told apart by the loss's curvature in the score, p (1 - p) or constant.
    """
    scores = jnp.array([-1.0, 0.0, 2.0])
    curvature = np.asarray(jax.vmap(jax.grad(jax.grad(loss)))(scores, jnp.zeros(3)))
    if np.allclose(curvature, jax.nn.sigmoid(scores) * jax.nn.sigmoid(-scores), atol=1e-4):
        return "bernoulli"
    return "gaussian" if curvature[0] > 0 and np.allclose(curvature, curvature[0], rtol=1e-4) else None


def as_truth(loss: PointwiseLoss) -> Callable[[Examples], Examples]:
    """A function that makes support examples the truth of this loss: constant, and targets of clicks in [0, 1].

    Where labels or weights are learned (`with_labels`, `reweighted`), a loss on the support set would be lowered by
    moving the targets, or by weighing what is hard less; and the logistic loss has no lowest value outside [0, 1].
    """
    clicks = likelihood(loss) == "bernoulli"

    def truth(examples: Examples) -> Examples:
        target, mask = jax.lax.stop_gradient((examples.target, examples.mask))
        return examples._replace(target=jnp.clip(target, 0, 1) if clicks else target, mask=mask)

    return truth
