"""Content: a profile of the fields of the user's items, which scores all items by their fields."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.models.model import Model
from metarec_jax.strategies.ials import need_design, only_ranks
from metarec_jax.strategies.observed import popularity
from metarec_jax.strategies.smooth import at, positives, smooth
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss

RARE = 0.05  # lower bound of the standard deviation that a column is divided by


class Profile(NamedTuple):
    """A user's weights of the columns `[users, columns]` and of popularity `[users]`."""

    columns: jax.Array
    popularity: jax.Array


def content(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, shrink: float = 2.0) -> Strategy:
    """Content-based ranking: a Rocchio profile of item fields with meta-learned weights.

        s = sum_S w t z_i / (shrink(n) + sum_S w t),   score(x_j) = tau(n) sum_c g_c s_c z_jc + c(n) log p(x_j)

    z are the columns of `design`, standardised over the training users' positives, so that sharing a rare value counts
    for more than sharing a frequent one. n is the number of positives. g, shrink, tau and c are learned by the loss of
    `Ranking`. A new item is scored like any other.

    Args:
      model: `design`.
      loss: not used: the strategy ranks.
      shrink: initial pseudo-count.

    Raises:
      ValueError: another model, or `shrink` is not positive.

    References:
      Rocchio, Relevance Feedback in Information Retrieval, 1971.
    """
    need_design(model, "content")
    if shrink <= 0:
        raise ValueError(f"shrink must be above 0, got {shrink}")
    embed, width = model.embed, model.width
    assert embed is not None
    assert width is not None

    def fit(observed: Observed) -> Params:
        columns = np.asarray(embed({}, observed.features))
        weight = np.asarray(observed.positives().sum(0)).ravel() / max(int(observed.positive.sum()), 1)
        mean = weight @ columns
        deviation = np.sqrt(weight @ (columns - mean) ** 2)
        scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, RARE), 0)
        return {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}

    def init(key: jax.Array) -> Params:
        return {name: smooth() for name in ("scale", "shrink", "popularity")} | {
            "columns": jnp.zeros(width), "dislike": jnp.zeros(()),
        }  # fmt: skip

    def standardised(params: Params, features: Features) -> jax.Array:
        fitted = params["tables"]["fitted"]
        return (embed({}, features) - fitted["mean"]) * fitted["scale"]

    def adapt(params: Params, support: Examples, key: jax.Array) -> Profile:
        count, keep = positives(support), support.mask > 0
        target = jnp.where(keep, support.target, 0.0)
        z = jnp.where(keep[..., None], standardised(params, support.features), 0.0)
        value = jnp.where(keep, support.mask * (target - 0.3 * (1 + params["dislike"]) * (1 - target)), 0.0)
        pseudo_count = shrink * jnp.exp(at(params["shrink"], count))[:, None]
        mean = jnp.einsum("un,unf->uf", value, z) / (pseudo_count + jnp.abs(value).sum(1, keepdims=True))
        scale = 0.02 * jnp.exp(at(params["scale"], count))[:, None]
        return Profile(scale * jnp.exp(10 * params["columns"]) * mean, at(params["popularity"], count))

    def predict(params: Params, adapted: Profile, features: Features) -> jax.Array:
        from_content = jnp.einsum("unf,uf->un", standardised(params, features), adapted.columns)
        return from_content + adapted.popularity[:, None] * popularity(params, features)

    def items(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        return standardised(params, features), popularity(params, features)

    def score(params: Params, adapted: Profile, side: tuple[jax.Array, jax.Array]) -> jax.Array:
        return adapted.columns @ side[0].T + adapted.popularity[:, None] * side[1]

    return Strategy(init, adapt, predict, only_ranks("content"), items=items, score=score, fit=fit, ranks=True)
