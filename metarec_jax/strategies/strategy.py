"""Strategy: how a meta-learner adapts a shared recommender to each user, as a NamedTuple of pure functions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from metarec_jax.types import Examples, Features, Params, Task

Adapted = Any  # a pytree of arrays `[users, ...]`: fast weights, a posterior, a context vector, ...


class Strategy(NamedTuple):
    """A meta-learner as training, evaluation and serving use it. All functions take a batch of users.

    Attributes:
      init: `init(key) -> params`.
      adapt: `adapt(params, support, key) -> adapted`, from `Examples` with arrays `[users, examples, ...]`.
      predict: `predict(params, adapted, features) -> scores` `[users, examples]`.
      loss: `loss(params, task, key) -> (scalar, aux)`; meta-training follows its gradient.
      deviation: `deviation(params, adapted, features) -> [users, examples]`, the predictive standard deviation of a
        rating (noise included) or of a click's logit; None if the strategy does not estimate it.
      sample: `sample(params, adapted, keys, strength) -> adapted`: draw adapted values from each user's posterior, with
        `keys` `[users]`; the difference from the posterior mean is multiplied by the scalar `strength`. None if the
        strategy has no posterior.
      labelled: whether the strategy already learns labels for the grades of support targets (`with_labels`).
      items: `items(params, features) -> side`: the part of the score that depends on items alone. Features are
        `[n, ...]` without a users axis, and so are the arrays of `side`. Computed once per training step and once per
        served model version. None: scores come from `predict`.
      score: `score(params, adapted, side) -> [users, n]`, set together with `items`: the scores of `predict`.
      prefixes: `prefixes(params, support, key) -> adapted` with leading axes `[users, examples + 1]`: the adapted
        values after the first t examples, for every t, in one pass. `support` is in time order with padding last. Used
        in training only. With a key, dropout is active; with None, entry t equals `adapt` of the first t examples.
      fit: `fit(observed) -> arrays`, fitted to the training users in closed form. The other functions read the result
        from `params["tables"]["fitted"]`, which gets no gradient.
      ranks: whether it adapts to positives alone and scores the whole catalogue; `ranked` adds this to any strategy.
      contrast: whether it fits the support targets and therefore needs negatives among them, which `ranked` samples.
      outer: what the meta-loss differentiates, which `ranked` keeps. "query": the query loss after adaptation.
        "shared": the loss of the shared model before adaptation. "own": an update rule, not a loss of query scores.
      novelty: weight of log popularity that is subtracted from the scores and not from those in `ranking_loss`.
    """

    init: Callable[[jax.Array], Params]
    adapt: Callable[[Params, Examples, jax.Array], Adapted]
    predict: Callable[[Params, Adapted, Features], jax.Array]
    loss: Callable[[Params, Task, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    deviation: Callable[[Params, Adapted, Features], jax.Array] | None = None
    labelled: bool = False
    items: Callable[[Params, Features], Any] | None = None
    score: Callable[[Params, Adapted, Any], jax.Array] | None = None
    prefixes: Callable[[Params, Examples, jax.Array | None], Adapted] | None = None
    fit: Callable[[Any], Params] | None = None
    ranks: bool = False
    contrast: bool = True
    sample: Callable[[Params, Adapted, jax.Array, jax.Array], Adapted] | None = None
    outer: Literal["query", "shared", "own"] = "query"
    novelty: float = 0.0
