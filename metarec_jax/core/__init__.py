"""Inner and outer loops in pure JAX: usable alone in any JAX codebase.

Knows no files, no flax and no recommender; speaks `Examples` and `Task` and the caller's own `apply(params, features)`.

`adapt` and `predict` are the engine of `fastweights`, which never forms a user's weights where it can do without;
`inner` has the same two in the plain form, `implicit` differentiates the inner minimum instead of the way there;
`sparse` is the meta-step whose cost does not grow with the rows of its tables.
"""

from metarec_jax._moved import moved
from metarec_jax.core import fastweights, implicit, inner, outer, sparse
from metarec_jax.core.fastweights import adapt, mean_change, predict, weights
from metarec_jax.core.inner import merge, partition
from metarec_jax.core.outer import chunked, meta_step, query_loss

__all__ = [
    "adapt",
    "chunked",
    "fastweights",
    "implicit",
    "inner",
    "mean_change",
    "merge",
    "meta_step",
    "outer",
    "partition",
    "predict",
    "query_loss",
    "sparse",
    "weights",
]

__getattr__ = moved(__name__, {"kernel": "metarec_jax.core.experimental.kernel"})
