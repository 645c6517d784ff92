"""Item-kNN: items that the same users choose, with meta-learned weights of items, dislikes and popularity."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.collaborative import factorise
from metarec_jax.collaborative.item_to_item import padded
from metarec_jax.core.columns import add_to_columns
from metarec_jax.data.schema import ITEM_ID
from metarec_jax.models.model import Model
from metarec_jax.strategies.ease import Weighed
from metarec_jax.strategies.ials import need_design, only_ranks
from metarec_jax.strategies.observed import among, popularity
from metarec_jax.strategies.smooth import at, positives, smooth
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.weights import example_weights, need_half_life, weigh
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss


def item_knn(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    neighbours: int = 200,
    shrink: float = 10.0,
    half_life: float | None = None,
) -> Strategy:
    """Item-based nearest neighbours: sum of an item's similarities to the support, on a log scale.

        score(x_j) = tau log(1 + b sum_{i in S} w_i t_i s_ij) + c log p(x_j)
        s_ij = x_i . x_j / (|x_i| |x_j| + shrink)

    s is fitted to the training users (`factorise.item_knn`) and sparse: each item keeps its nearest neighbours. This
    suits catalogues that are too large or too sparse for `ease`. The logarithm preserves the order and keeps the
    softmax from being overconfident about the nearest items.

    t is an example's label, w = exp(weight of the item + d (1 - t)); tau, b and c are smooth functions of the number n
    of positives. w, tau, b and c are learned by the loss of `Ranking`. A new item is scored by popularity alone.

    Args:
      model: `design`; only the size of its catalogue is read.
      loss: not used: the strategy ranks.
      neighbours: neighbours kept per item.
      shrink: added to the denominator of the cosines.
      half_life: see `metarec_jax.ials`.

    Raises:
      ValueError: the model is another; `neighbours` is below 1, `shrink` below 0 or `half_life` not above 0.

    Differs from the paper:
      - The score is the logarithm of a weighted sum of similarities; the paper predicts a weighted mean of ratings.
      - Example weights, and the weight of log popularity, are meta-learned.

    References:
      Sarwar et al., Item-based Collaborative Filtering Recommendation Algorithms, WWW 2001.
    """
    need_design(model, "item_knn")
    if neighbours < 1 or shrink < 0:
        raise ValueError(f"need neighbours >= 1 and shrink >= 0, got {neighbours=}, {shrink=}")
    need_half_life(half_life)
    assert model.items is not None
    rows = model.items

    def fit(observed: Observed) -> Params:
        similarity = factorise.item_knn(observed.confidences(), neighbours, shrink)
        columns, values = padded(similarity, neighbours)
        return {"columns": columns, "values": values}

    def init(key: jax.Array) -> Params:
        return {"scale": smooth(), "sharpness": smooth(), "popularity": smooth()} | example_weights(rows, half_life)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Weighed:
        fitted, count, keep = params["tables"]["fitted"], positives(support), support.mask > 0
        ids = jnp.where(keep, support.features[ITEM_ID], 0)
        weight = weigh(params, support, half_life) * jnp.where(keep, support.target, 0.0)

        def add(total: jax.Array, example: Any) -> tuple[jax.Array, None]:
            row, w = example
            return add_to_columns(total, fitted["columns"][row], w[:, None] * fitted["values"][row]), None

        sums, _ = jax.lax.scan(add, jnp.zeros((len(ids), len(fitted["columns"]))), (ids.T, weight.T))
        scale, sharpness = 4 * jnp.exp(at(params["scale"], count)), 30 * jnp.exp(at(params["sharpness"], count))
        sums = scale[:, None] * jnp.log1p(sharpness[:, None] * jnp.maximum(sums, 0.0))  # a label may be below 0
        return Weighed(sums, 0.1 + at(params["popularity"], count))

    def predict(params: Params, adapted: Weighed, features: Features) -> jax.Array:
        return among(adapted.own, features) + adapted.popularity[:, None] * popularity(params, features)

    def items(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        return features[ITEM_ID], popularity(params, features)

    def score(params: Params, adapted: Weighed, side: tuple[jax.Array, jax.Array]) -> jax.Array:
        return adapted.own[:, side[0]] + adapted.popularity[:, None] * side[1]

    return Strategy(init, adapt, predict, only_ranks("item_knn"), items=items, score=score, fit=fit, ranks=True)
