"""Likelihood: the distribution of the target given the score of which a loss is the negative logarithm."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.types import Examples, PointwiseLoss


@lru_cache(maxsize=64)
def likelihood(loss: PointwiseLoss) -> Literal["bernoulli", "gaussian"] | None:
    """Return "bernoulli" for the logistic loss, "gaussian" for a multiple of the squared error, else None.

    They are told apart by the curvature of the loss in the score: p (1 - p), or constant.
    """
    scores = np.array([-1.0, 0.0, 2.0], np.float32)
    curvature = np.asarray(jax.jit(jax.vmap(jax.grad(jax.grad(loss))))(scores, np.zeros(3, np.float32)))
    p = 1 / (1 + np.exp(-scores))
    if np.allclose(curvature, p * (1 - p), atol=1e-4):
        return "bernoulli"
    return "gaussian" if curvature[0] > 0 and np.allclose(curvature, curvature[0], rtol=1e-4) else None


def as_truth(loss: PointwiseLoss) -> Callable[[Examples], Examples]:
    """Return a function that makes support examples safe as ground truth: no gradient, click targets cut to [0, 1].

    Where labels or weights are learned (`with_labels`, `reweighted`), a loss on the support set could be lowered by
    moving the targets or by giving hard examples less weight. The logistic loss also has no minimum for targets outside
    [0, 1].
    """
    clicks = likelihood(loss) == "bernoulli"

    def as_constants(examples: Examples) -> Examples:
        target, mask = jax.lax.stop_gradient((examples.target, examples.mask))
        return examples._replace(target=jnp.clip(target, 0, 1) if clicks else target, mask=mask)

    return as_constants
