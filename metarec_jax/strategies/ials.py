"""iALS with an empirical Bayes prior: a user's vector in closed form, with what it weighs meta-learned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.collaborative import factorise
from metarec_jax.core.solve import solve
from metarec_jax.models.model import Model
from metarec_jax.models.profile import look_up, profile_of
from metarec_jax.strategies.observed import popularity
from metarec_jax.strategies.smooth import at, positives, smooth
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.weights import example_weights, need_half_life, weigh
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task

NUMBERS = ("unobserved", "penalty", "prior", "mean", "scale", "popularity")  # smooth functions of n
CONTENT = 30.0  # interactions of an item that the ridge regression of its vector on its fields counts as


class Vector(NamedTuple):
    """What is known of each user: scores are `mean . v + popularity log p`.

    Attributes:
      mean: `[users, rank]`.
      popularity: `[users]`.
      precision: `[users, rank, rank]` of the vector's posterior, in units of the scores.
    """

    mean: jax.Array
    popularity: jax.Array
    precision: jax.Array


def ials(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    rank: int = 64,
    unobserved: float | None = None,
    penalty: float | None = None,
    sweeps: int = 8,
    half_life: float | None = None,
) -> Strategy:
    """Implicit matrix factorisation whose fold-in is meta-learned, from a prior that the training users give.

        u = H^-1 (sum_S w t v + m P mu),   H = sum_S w v v' + a V'V + P,   P = l I + s C^-1
        score(x) = tau u . v(x) + c log p(x)

    V are the item vectors of alternating least squares on the training users. mu and C are mean and covariance of these
    users' vectors (empirical Bayes); with attributes, mu is their ridge regression on them. t is the example's label (1
    for a positive), w = exp(weight of the item + d (1 - t)), so that a dislike has a weight and a value of its own. a,
    l, s, m, tau and c are smooth functions of the number n of positives. All of these are learned by the loss of
    `Ranking`; V is not. An item that is new is known by the ridge regression of V on its fields.

    Args:
      model: one without parameters, `design`: its `embed` reads the items' fields, its `profile` the users'.
      loss: not used: the strategy ranks.
      rank: width of the vectors.
      unobserved, penalty, sweeps: of the alternating least squares; see `metarec_jax.collaborative.factorise.ials`.
      half_life: places in time after which an example has half the weight, at first; it is learned. None: all weigh
        the same.

    Raises:
      ValueError: the model has parameters, or a number is not positive.

    References:
      Hu, Koren and Volinsky, Collaborative Filtering for Implicit Feedback Datasets, ICDM 2008, section 4.
      Rendle et al., Revisiting the Performance of iALS on Item Recommendation Benchmarks, RecSys 2022.
    """
    need_design(model, "ials")
    if rank < 1 or sweeps < 1 or any(x is not None and x <= 0 for x in (unobserved, penalty)):
        raise ValueError(f"need positive numbers, got {rank=}, {unobserved=}, {penalty=}, {sweeps=}")
    need_half_life(half_life)
    embed, profile = model.embed, model.profile
    assert embed is not None
    assert profile is not None
    assert model.items is not None
    rows = model.items

    def fit(observed: Observed) -> Params:
        confidences = observed.confidences()
        usual = factorise.scales(confidences)
        everything, ridge = (u if own is None else own for own, u in zip((unobserved, penalty), usual, strict=True))
        found = factorise.ials(confidences, rank, unobserved=everything, penalty=ridge, sweeps=sweeps)
        count = np.asarray(confidences.sum(0)).ravel()
        items = np.asarray(embed({}, observed.features))
        content = ridge_regression(items, found.items, CONTENT, count)
        vectors = np.where(count[:, None] > 0, found.items, items @ content).astype(np.float32)
        vectors[0] = 0
        user = {f"user/{name}": table for name, table in observed.profile.items()}
        people = np.asarray(profile.apply({}, user | {"item_id": np.zeros(observed.users, np.int32)}))
        mean = ridge_regression(people, found.users, CONTENT)
        spread = found.users - people @ mean
        covariance = np.cov(spread.T).reshape(rank, rank) if observed.users > 1 else np.zeros((rank, rank))
        covariance += (1e-6 + 1e-3 * np.trace(covariance) / rank) * np.eye(rank)
        return {
            "vectors": vectors,
            "gram": (everything * vectors.T @ vectors).astype(np.float32),
            "content": content,
            "mean": mean,
            "precision": np.linalg.inv(covariance).astype(np.float32),
            # of the plain fold-in for a user with ten positives
            "penalty": np.float32(ridge * (10 + everything * observed.items)),
        }

    def init(key: jax.Array) -> Params:
        return {name: smooth() for name in NUMBERS} | example_weights(rows, half_life)

    def vectors(params: Params, features: Features) -> jax.Array:
        fitted, unknown = params["tables"]["fitted"], lambda x: (x == 0).astype(jnp.float32)[..., None]
        known = look_up(fitted["vectors"].__getitem__, features["item_id"], "categorical")
        return known + look_up(unknown, features["item_id"], "categorical") * (embed({}, features) @ fitted["content"])

    def adapt(params: Params, support: Examples, key: jax.Array) -> Vector:
        fitted, count, keep = params["tables"]["fitted"], positives(support), support.mask > 0
        numbers = {name: at(params[name], count) for name in NUMBERS}
        v = jnp.where(keep[..., None], vectors(params, support.features), 0.0)
        target = jnp.where(keep, support.target, 0.0)
        weight = weigh(params, support, half_life)
        prior = (fitted["penalty"] * jnp.exp(numbers["penalty"]))[:, None, None] * jnp.eye(rank)
        prior += (0.03 * jnp.exp(numbers["prior"]))[:, None, None] * fitted["precision"]
        precision = jnp.exp(numbers["unobserved"])[:, None, None] * fitted["gram"] + prior
        precision += jnp.einsum("unf,un,ung->ufg", v, weight, v)
        start = profile_of(profile, {}, support) @ fitted["mean"]
        pulled = (1 + numbers["mean"])[:, None] * jnp.einsum("ufg,ug->uf", prior, start)
        mean = solve(precision, jnp.einsum("unf,un->uf", v, weight * target) + pulled)
        scale = 8 * jnp.exp(numbers["scale"])
        return Vector(scale[:, None] * mean, 0.3 + numbers["popularity"], precision / jnp.square(scale)[:, None, None])

    def predict(params: Params, adapted: Vector, features: Features) -> jax.Array:
        own = jnp.einsum("unf,uf->un", vectors(params, features), adapted.mean)
        return own + adapted.popularity[:, None] * popularity(params, features)

    def items(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        return vectors(params, features), popularity(params, features)

    def score(params: Params, adapted: Vector, side: tuple[jax.Array, jax.Array]) -> jax.Array:
        return adapted.mean @ side[0].T + adapted.popularity[:, None] * side[1]

    def deviation(params: Params, adapted: Vector, features: Features) -> jax.Array:
        v = vectors(params, features)
        covariance = solve(adapted.precision, jnp.broadcast_to(jnp.eye(rank), adapted.precision.shape))
        return jnp.sqrt(jnp.maximum(jnp.einsum("unf,ufg,ung->un", v, covariance, v), 0.0))

    return Strategy(init, adapt, predict, only_ranks("ials"), deviation, items=items, score=score, fit=fit, ranks=True)


def need_design(model: Model, name: str) -> None:
    """Raise a `ValueError` unless the model reads the fields of items and users without parameters."""
    known = model.embed is not None and model.profile is not None and model.items is not None
    if not known or jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))):
        raise ValueError(f'{name} is fitted in closed form on a network without parameters: model="design"')


def only_ranks(name: str) -> Any:
    """The loss of a strategy that has none for clicks and ratings."""

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        raise ValueError(f'{name} ranks the catalogue: train it with objective="ranking"')

    return loss


def ridge_regression(x: np.ndarray, y: np.ndarray, penalty: float, weight: np.ndarray | None = None) -> np.ndarray:
    """`[columns, targets]` float32 ridge regression of `y` on `x`, whose first column is 1 and not penalised."""
    weighed = x if weight is None else x * weight[:, None]
    ridge = np.full(x.shape[1], penalty)
    ridge[0] = 1e-3
    return np.linalg.solve(weighed.T @ x + np.diag(ridge), weighed.T @ y).astype(np.float32)
