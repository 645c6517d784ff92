"""ALS: matrix factorisation of ratings with fold-in, a user's bias and vector in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import factorise
from metarec_jax.core import query_loss
from metarec_jax.core.solve import solve
from metarec_jax.models.model import Model
from metarec_jax.models.profile import look_up
from metarec_jax.strategies.ials import CONTENT, need_design, ridge_regression
from metarec_jax.strategies.observed import Observed
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks import Examples, Features, Params, PointwiseLoss, Task


class Taste(NamedTuple):
    """What is known of each user: ratings are `bias + b(x) + vector . v(x)`.

    Attributes:
      bias: `[users]`, the mean of all ratings included.
      vector: `[users, rank]`.
      variance: `[users]` of the bias, in units of the noise.
      precision: `[users, rank, rank]` of the vector, in units of the noise.
    """

    bias: jax.Array
    vector: jax.Array
    variance: jax.Array
    precision: jax.Array


def als(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    rank: int = 8,
    penalty: float = 5.0,
    shrink: float = 5.0,
    sweeps: int = 15,
    learn: bool = False,
) -> Strategy:
    """Matrix factorisation of ratings; the items are fitted once, a user is folded in.

        r(x) = mean + b(x) + b_u + u . v(x)
        b_u = sum_S w (y - mean - b) / (sum_S w + s)
        u = (sum_S w v v' + l I)^-1 sum_S w v (y - mean - b - b_u)

    mean, b and V come from alternating least squares on the training users (`metarec_jax.factorise.explicit_als`); y
    and w are the target and the weight of an example. An item that is new has the bias and the vector that a ridge
    regression on its fields gives. `deviation` is that of the Gaussian posterior of b_u and u and of the noise, for
    items that are known.

    Args:
      model: one without parameters, `design`: its `embed` reads the items' fields.
      loss: squared error.
      rank: width of the vectors.
      penalty, shrink, sweeps: l, s and the sweeps of the alternating least squares.
      learn: meta-train factors of l and s, from 1, on users that the item vectors have not seen; else nothing is
        trained by gradients, and training ends with the fit.

    Raises:
      ValueError: another loss; the model has parameters; a number is not positive.

    References:
      Zhou et al., Large-Scale Parallel Collaborative Filtering for the Netflix Prize, AAIM 2008.
      Koren, Factorization Meets the Neighborhood, KDD 2008, equation 1 (biases).
    """
    if loss is not optax.losses.squared_error:
        raise ValueError('als predicts ratings: train it with objective="rating"')
    need_design(model, "als")
    if rank < 1 or sweeps < 1 or penalty <= 0 or shrink <= 0:
        raise ValueError(f"need positive numbers, got {rank=}, {penalty=}, {shrink=}, {sweeps=}")
    embed = model.embed
    assert embed is not None

    def fit(observed: Observed) -> Params:
        rating = observed.grade.astype(float)
        mean, bias, vectors = factorise.explicit_als(
            observed.user, observed.item, rating, observed.items, rank, penalty=penalty, shrink=shrink, sweeps=sweeps
        )
        noise = noise_of(observed.user, vectors[observed.item], rating - mean - bias[observed.item])
        count, columns = np.bincount(observed.item, minlength=observed.items), np.asarray(embed({}, observed.features))
        found = np.concatenate([bias[:, None], vectors], 1)
        content = ridge_regression(columns, found, CONTENT, count)
        found = np.where(count[:, None] > 0, found, columns @ content)
        found[0] = 0  # the unknown item: see `sides`
        return {
            "mean": np.float32(mean), "items": found.astype(np.float32), "content": content, "noise": np.float32(noise),
        }  # fmt: skip

    def noise_of(user: np.ndarray, x: np.ndarray, rest: np.ndarray) -> float:
        """Standard deviation of a rating around what the user's own others predict: leaving one out, e / (1 - h)."""
        count = np.bincount(user)
        of_user = np.bincount(user, rest) / (count + shrink)
        rest = rest - of_user[user]
        error = rest - (x * factorise.least_squares(user, x, rest, len(count), penalty)[user]).sum(1)
        inverse = np.linalg.inv(factorise.gram_of(user, x, len(count)) + penalty * np.eye(rank))
        leverage = np.zeros(len(x))
        for a in range(rank):
            for b in range(rank):
                leverage += x[:, a] * x[:, b] * inverse[user, a, b]
        left = np.maximum(1 - leverage - 1 / (count[user] + shrink), 0.05)
        return float(np.sqrt(np.mean(error**2 / left)))

    def init(key: jax.Array) -> Params:
        return {name: jnp.zeros(()) for name in ("penalty", "shrink")} if learn else {}

    def number(params: Params, name: str, start: float) -> jax.Array:
        return start * jnp.exp(params[name]) if learn else jnp.float32(start)

    def sides(params: Params, features: Features) -> jax.Array:
        """`[..., 1 + rank]` biases and vectors of items."""
        fitted, unknown = params["tables"]["fitted"], lambda x: (x == 0).astype(jnp.float32)[..., None]
        known = look_up(fitted["items"].__getitem__, features["item_id"], "categorical")
        return known + look_up(unknown, features["item_id"], "categorical") * (embed({}, features) @ fitted["content"])

    def adapt(params: Params, support: Examples, key: jax.Array) -> Taste:
        mean, keep = params["tables"]["fitted"]["mean"], support.mask > 0
        weight, side = jnp.where(keep, support.mask, 0.0), sides(params, support.features)
        v = jnp.where(keep[..., None], side[..., 1:], 0.0)
        rest = jnp.where(keep, support.target - mean - side[..., 0], 0.0)
        total = weight.sum(1) + number(params, "shrink", shrink)
        bias = (weight * rest).sum(1) / total
        rest = jnp.where(keep, rest - bias[:, None], 0.0)
        precision = jnp.einsum("unf,un,ung->ufg", v, weight, v)
        precision += number(params, "penalty", penalty) * jnp.eye(rank)
        return Taste(mean + bias, solve(precision, jnp.einsum("unf,un->uf", v, weight * rest)), 1 / total, precision)

    def predict(params: Params, taste: Taste, features: Features) -> jax.Array:
        side = sides(params, features)
        return taste.bias[:, None] + side[..., 0] + jnp.einsum("unf,uf->un", side[..., 1:], taste.vector)

    def score(params: Params, taste: Taste, side: jax.Array) -> jax.Array:
        return taste.bias[:, None] + side[:, 0] + taste.vector @ side[:, 1:].T

    def deviation(params: Params, taste: Taste, features: Features) -> jax.Array:
        v = sides(params, features)[..., 1:]
        covariance = solve(taste.precision, jnp.broadcast_to(jnp.eye(rank), taste.precision.shape))
        spread = jnp.maximum(jnp.einsum("unf,ufg,ung->un", v, covariance, v), 0.0)
        return params["tables"]["fitted"]["noise"] * jnp.sqrt(1 + taste.variance[:, None] + spread)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = predict(params, adapt(params, task.support, key), task.query.features)
        return query_loss(scores, task.query, loss), {}

    return Strategy(init, adapt, predict, meta_loss, deviation, items=sides, score=score, fit=fit)
