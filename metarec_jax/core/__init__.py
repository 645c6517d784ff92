"""Inner and outer loops in pure JAX: usable alone in any JAX codebase.

Knows no files, no flax and no recommender; speaks `Examples` and `Task` and the caller's own `apply(params, features)`.
"""

from metarec_jax.core.inner import adapt, merge, partition, predict
from metarec_jax.core.outer import meta_step, query_loss

__all__ = ["adapt", "merge", "meta_step", "partition", "predict", "query_loss"]
