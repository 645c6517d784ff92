"""EASE: the closed-form item-item model, with meta-learned weights of items, dislikes and popularity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.collaborative import factorise
from metarec_jax.data.schema import ITEM_ID
from metarec_jax.models.model import Model
from metarec_jax.models.profile import look_up
from metarec_jax.strategies.ials import need_design, only_ranks
from metarec_jax.strategies.observed import among, popularity
from metarec_jax.strategies.smooth import at, positives, smooth
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.weights import example_weights, need_half_life, weigh
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss

MEMORY = 1 << 31  # bytes


class Weighed(NamedTuple):
    """A user's scores of all items `[users, items]`, or vector `[users, rank]`; and the weight of popularity."""

    own: jax.Array
    popularity: jax.Array


def ease(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    penalty: float = 400.0,
    rank: int | None = None,
    half_life: float | None = None,
    memory: int = MEMORY,
) -> Strategy:
    """EASE: a linear autoencoder without hidden units, from support to scores.

        score(x_j) = tau sum_{i in S} w_i t_i B_ij + c log p(x_j)

    B is fitted to the training users (`factorise.ease`). t is an example's label, w = exp(weight of the item
    + d (1 - t)); tau and c are smooth functions of the number n of positives. w, tau and c are learned by the loss of
    `Ranking`. A new item, for which B has no column, is scored by popularity alone.

    Args:
      model: `design`; only the size of its catalogue is read.
      loss: not used: the strategy ranks.
      penalty: L2 penalty of B.
      rank: store B as this many components (`factorise.low_rank_ease`) instead of `items^2` numbers.
      half_life: see `metarec_jax.ials`.
      memory: bytes that one fit of B may take: three matrices `[items, items]` (X'X, its inverse and B). Training fits
        in parallel and keeps one B for each of `Ranking`'s folds and one for all users, five by default.

    Raises:
      ValueError: the model is another; a number is not positive.
      DataError: from `fit`, before anything is allocated: a fit needs more than `memory`.

    Differs from the paper:
      Support weights w and the scale tau are meta-learned, and log popularity is added; the paper's score is B alone.

    References:
      Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019.
    """
    need_design(model, "ease")
    if penalty <= 0 or (rank is not None and rank < 1):
        raise ValueError(f"need penalty > 0 and rank >= 1, got {penalty=}, {rank=}")
    need_half_life(half_life)
    assert model.items is not None
    rows = model.items

    def fit(observed: Observed) -> Params:
        confidences = observed.confidences()
        if rank is None:
            task = f"ease over {observed.items - 1:,} items"
            advice = 'give it a rank, strategy_options={"rank": 256}, or take strategy="ials"'
            factorise.check_memory(task, factorise.dense_bytes(observed.items, 3), memory, advice)
            return {"weights": factorise.ease(confidences, penalty)}
        left, right = factorise.low_rank_ease(confidences, rank, penalty)
        return {"left": left, "right": right}

    def init(key: jax.Array) -> Params:
        return {"scale": smooth(), "popularity": smooth()} | example_weights(rows, half_life)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Weighed:
        fitted, count, keep = params["tables"]["fitted"], positives(support), support.mask > 0
        target, ids = jnp.where(keep, support.target, 0.0), support.features[ITEM_ID]
        weight = weigh(params, support, half_life) * target
        scale = 4 * jnp.exp(at(params["scale"], count))[:, None]
        if rank is None:
            personal = summed(fitted["weights"], ids, weight)
        else:
            personal = jnp.einsum("un,unf->uf", weight, fitted["left"][ids])
        return Weighed(scale * personal, 0.1 + at(params["popularity"], count))

    def predict(params: Params, adapted: Weighed, features: Features) -> jax.Array:
        if rank is None:
            personal = among(adapted.own, features)
        else:
            right = look_up(params["tables"]["fitted"]["right"].__getitem__, features[ITEM_ID], "categorical")
            personal = jnp.einsum("unf,uf->un", right, adapted.own)
        return personal + adapted.popularity[:, None] * popularity(params, features)

    def items(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        ids = features[ITEM_ID]
        return ids if rank is None else params["tables"]["fitted"]["right"][ids], popularity(params, features)

    def score(params: Params, adapted: Weighed, side: tuple[jax.Array, jax.Array]) -> jax.Array:
        personal = adapted.own[:, side[0]] if rank is None else adapted.own @ side[0].T
        return personal + adapted.popularity[:, None] * side[1]

    return Strategy(init, adapt, predict, only_ranks("ease"), items=items, score=score, fit=fit, ranks=True)


def summed(table: jax.Array, rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Return weighted sums of rows of `table`, `[users, columns]`, for `rows` and `weight` `[users, n]`.

    It scans over examples, so that no array of users x n x columns is ever held, not even for the gradient.
    """

    @jax.checkpoint
    def add(total: jax.Array, example: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, weight = example
        return total + weight[:, None] * table[row], None

    return jax.lax.scan(add, jnp.zeros((len(rows), table.shape[1])), (rows.T, weight.T))[0]
