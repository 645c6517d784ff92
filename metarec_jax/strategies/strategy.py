"""Strategy: a way to adapt a shared recommender to each user, as a value of pure functions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from metarec_jax.types import Examples, Features, Params, Task

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
      items: `items(params, features) -> side`: what it computes of items alone, features `[n, ...]` without an axis of
        users, arrays `[n, ...]`. Computed once a step in training and once a model version in serving. None: read from
        `predict` instead.
      score: `score(params, adapted, side) -> [users, n]`, given with `items`: the scores of `predict` from them.
      prefixes: `prefixes(params, support, key) -> adapted` with leading axes `[users, examples + 1]`: the adapted
        values after the first t examples, for every t, in one pass; `support` is in time order, padding last. For
        training alone: with a key dropout acts, with None entry t is what `adapt` gives of the first t.
      fit: `fit(observed) -> arrays`, what it learns from the training users in closed form; `adapt` and all else find
        it in `params["tables"]["fitted"]`, where no gradient reaches it.
      ranks: whether it adapts to positives alone and scores the whole catalogue; the others learn to by `ranked`.
      contrast: whether it fits the support targets and hence needs negatives among them, which `ranked` draws.
      outer: what its loss differentiates, which `ranked` keeps: "query", the query loss after adapting; "shared", that
        of the shared model, before adapting; "own", a rule that cannot be written as a loss of query scores.
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
    outer: Literal["query", "shared", "own"] = "query"
