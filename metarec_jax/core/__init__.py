"""Inner and outer loops of meta-learning in pure JAX, usable alone in any JAX codebase.

No files, no flax, no recommender: only `Examples`, `Task` and the caller's `apply(params, features)`.

- `fastweights`: `adapt` and `predict` in factored form, without per-user weight matrices where possible. Exported here.
- `inner`: the same two functions in the plain form, with per-user weights.
- `implicit`: differentiates the minimum of the inner problem instead of the inner loop.
- `outer`: meta-loss and meta-step.
- `layout`: users sharded over the devices of a mesh.
- `sparse`: a meta-step whose cost does not grow with the rows of the embedding tables.
"""

from metarec_jax._moved import moved
from metarec_jax.core import fastweights, implicit, inner, outer, sparse
from metarec_jax.core.fastweights import adapt, mean_change, predict, weights
from metarec_jax.core.inner import merge, partition
from metarec_jax.core.layout import Layout
from metarec_jax.core.outer import chunked, meta_step, query_loss

__all__ = [
    "Layout",
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
