"""Strategy: a way to adapt a shared recommender to each user, as a value of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metarec_jax.tasks import Examples, Features, Params, Task

Adapted = Any  # a pytree of arrays `[users, ...]`; what one user's adaptation consists of


class Strategy(NamedTuple):
    """What training, evaluation and serving know of a meta-learner. All functions work on a batch of users.

    Attributes:
      init: `init(key) -> params`.
      adapt: `adapt(params, support, key) -> adapted`, from `Examples` with arrays `[users, examples, ...]`.
      predict: `predict(params, adapted, features) -> scores` `[users, examples]`.
      loss: `loss(params, task, key) -> (scalar, aux)`; its gradient is what meta-training follows.
      deviation: `deviation(params, adapted, features) -> [users, examples]`, the predictive standard deviation of a
        rating (its noise included) or of a click's logit; None where the strategy does not know it.
      labelled: whether it has labels of its own for the grades of support targets (`with_labels`).
    """

    init: Callable[[jax.Array], Params]
    adapt: Callable[[Params, Examples, jax.Array], Adapted]
    predict: Callable[[Params, Adapted, Features], jax.Array]
    loss: Callable[[Params, Task, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    deviation: Callable[[Params, Adapted, Features], jax.Array] | None = None
    labelled: bool = False
