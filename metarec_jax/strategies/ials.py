"""iALS with an empirical Bayes prior: user vectors in closed form, with meta-learned weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.collaborative import factorise
from metarec_jax.core.solve import inverse_cholesky, normal_per_key, solve
from metarec_jax.data.schema import ITEM_ID, USER, prefixed
from metarec_jax.models.model import Model
from metarec_jax.models.profile import look_up, profile_of
from metarec_jax.strategies.observed import popularity
from metarec_jax.strategies.smooth import at, positives, smooth
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.strategies.weights import example_weights, need_half_life, weigh
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task

NUMBERS = ("unobserved", "penalty", "prior", "mean", "scale", "popularity")  # smooth functions of n
CONTENT = 30.0  # ridge penalty of the regressions of vectors on fields, in interactions or users


class Vector(NamedTuple):
    """Posterior of each user's vector: scores are `mean . v + popularity log p`.

    Attributes:
      mean: `[users, rank]`.
      popularity: `[users]`.
      precision: `[users, rank, rank]` posterior precision of the vector, in units of the scores.
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
    """Implicit matrix factorisation with a meta-learned fold-in and a prior estimated from the training users.

        u = H^-1 (sum_S w t v + m P mu),   H = sum_S w v v' + a V'V + P,   P = l I + s C^-1
        score(x) = tau u . v(x) + c log p(x)

    - V: the item vectors of alternating least squares on the training users; not meta-learned.
    - mu and C: mean and covariance of the training users' vectors (empirical Bayes). With user attributes, mu is their
      ridge regression on them.
    - t: the example's label (1 for a positive); w = exp(weight of the item + d (1 - t)), so that a dislike has its own
      weight and value.
    - a, l, s, m, tau and c: smooth functions of the number n of positives.

    The loss of `Ranking` trains the item weights, d and the smooth functions. The vector of a new item is the ridge
    regression of V on its fields.

    Args:
      model: one without parameters, `design`: its `embed` reads the items' fields, its `profile` the users'.
      loss: not used: the strategy ranks.
      rank: width of the vectors.
      unobserved, penalty, sweeps: of the alternating least squares; see `metarec_jax.collaborative.factorise.ials`.
      half_life: number of later examples after which an example has half the weight: the initial value of a learned
        parameter. None: no decay.

    Raises:
      ValueError: the model has parameters, or a number is not positive.

    Differs from the paper:
      - The fold-in has a prior mean and covariance and meta-learned weights; the papers use a ridge penalty alone.
      - Log popularity is added to the score.

    Example:
      Two users know items 1 and 2, a third knows 3 and 4. For a new user who knows item 1, item 2 scores above item 3:

      >>> data = mr.data.from_tables({"user_id": [1, 1, 2, 2, 3, 3], "item_id": [1, 2, 1, 2, 3, 4]})
      >>> train = mr.tasks.Histories.of(data, np.arange(1, 4))
      >>> strategy = mr.ials(mr.models.design(mr.models.fields_of(data)), rank=2)
      >>> observed = mr.tasks.observed.observe(train, mr.tasks.Target("ranking", threshold=1.0))
      >>> params = strategy.init(jax.random.key(0)) | {"tables": mr.strategies.observed.tables(strategy, observed)}
      >>> support = mr.Examples({"item_id": jnp.array([[1]])}, jnp.ones((1, 1)), jnp.ones((1, 1)))
      >>> vector = jax.jit(strategy.adapt)(params, support, jax.random.key(1))
      >>> jax.jit(strategy.predict)(params, vector, {"item_id": jnp.array([[2, 3]])}).argmax(1)
      Array([0], dtype=int32)

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
        defaults = factorise.scales(confidences)
        unobserved_weight, ridge = (
            default if given is None else given for given, default in zip((unobserved, penalty), defaults, strict=True)
        )
        factors = factorise.ials(confidences, rank, unobserved=unobserved_weight, penalty=ridge, sweeps=sweeps)
        count = np.asarray(confidences.sum(0)).ravel()
        items = np.asarray(embed({}, observed.features))
        content = ridge_regression(items, factors.items, CONTENT, count)
        vectors = np.where(count[:, None] > 0, factors.items, items @ content).astype(np.float32)
        vectors[0] = 0
        user = prefixed(USER, observed.profile)
        attributes = np.asarray(profile.apply({}, user | {ITEM_ID: np.zeros(observed.users, np.int32)}))
        mean = ridge_regression(attributes, factors.users, CONTENT)
        residual = factors.users - attributes @ mean
        covariance = np.cov(residual.T).reshape(rank, rank) if observed.users > 1 else np.zeros((rank, rank))
        covariance += (1e-6 + 1e-3 * np.trace(covariance) / rank) * np.eye(rank)
        return {
            "vectors": vectors,
            "gram": (unobserved_weight * vectors.T @ vectors).astype(np.float32),
            "content": content,
            "mean": mean,
            "precision": np.linalg.inv(covariance).astype(np.float32),
            # the penalty of the plain fold-in for a user with ten positives
            "penalty": np.float32(ridge * (10 + unobserved_weight * observed.items)),
        }

    def init(key: jax.Array) -> Params:
        return {name: smooth() for name in NUMBERS} | example_weights(rows, half_life)

    def vectors(params: Params, features: Features) -> jax.Array:
        fitted, unknown = params["tables"]["fitted"], lambda x: (x == 0).astype(jnp.float32)[..., None]
        stored = look_up(fitted["vectors"].__getitem__, features[ITEM_ID], "categorical")
        return stored + look_up(unknown, features[ITEM_ID], "categorical") * (embed({}, features) @ fitted["content"])

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
        prior_mean = profile_of(profile, {}, support) @ fitted["mean"]
        prior_term = (1 + numbers["mean"])[:, None] * jnp.einsum("ufg,ug->uf", prior, prior_mean)
        mean = solve(precision, jnp.einsum("unf,un->uf", v, weight * target) + prior_term)
        scale = 8 * jnp.exp(numbers["scale"])
        return Vector(scale[:, None] * mean, 0.3 + numbers["popularity"], precision / jnp.square(scale)[:, None, None])

    def predict(params: Params, adapted: Vector, features: Features) -> jax.Array:
        personal = jnp.einsum("unf,uf->un", vectors(params, features), adapted.mean)
        return personal + adapted.popularity[:, None] * popularity(params, features)

    def items(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        return vectors(params, features), popularity(params, features)

    def score(params: Params, adapted: Vector, side: tuple[jax.Array, jax.Array]) -> jax.Array:
        return adapted.mean @ side[0].T + adapted.popularity[:, None] * side[1]

    def deviation(params: Params, adapted: Vector, features: Features) -> jax.Array:
        v = vectors(params, features)
        covariance = solve(adapted.precision, jnp.broadcast_to(jnp.eye(rank), adapted.precision.shape))
        return jnp.sqrt(jnp.maximum(jnp.einsum("unf,ufg,ung->un", v, covariance, v), 0.0))

    def sample(params: Params, adapted: Vector, keys: jax.Array, strength: jax.Array) -> Vector:
        root = inverse_cholesky(adapted.precision)
        return adapted._replace(
            mean=adapted.mean + strength * jnp.einsum("ugf,ug->uf", root, normal_per_key(keys, rank))
        )

    return Strategy(
        init,
        adapt,
        predict,
        only_ranks("ials"),
        deviation,
        items=items,
        score=score,
        fit=fit,
        ranks=True,
        sample=sample,
    )


def need_design(model: Model, name: str) -> None:
    """Check that the model reads the fields of items and users without parameters.

    Raises:
      ValueError: it has parameters, or lacks `embed`, `profile` or `items`.
    """
    complete = model.embed is not None and model.profile is not None and model.items is not None
    if not complete or jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))):
        raise ValueError(f'{name} is fitted in closed form on a network without parameters: model="design"')


def only_ranks(name: str) -> Any:
    """Return a loss that raises: the strategy has none for clicks and ratings."""

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        raise ValueError(f'{name} ranks the catalogue: train it with objective="ranking"')

    return loss


def ridge_regression(x: np.ndarray, y: np.ndarray, penalty: float, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the ridge regression of `y` on `x`, `[columns, targets]` float32.

    Args:
      x: `[n, columns]`; the first column is 1 and hardly penalised.
      y: `[n, targets]`.
      penalty: of all other columns.
      weight: `[n]` weight of each row; None: all 1.
    """
    weighted = x if weight is None else x * weight[:, None]
    ridge = np.full(x.shape[1], penalty)
    ridge[0] = 1e-3
    return np.linalg.solve(weighted.T @ x + np.diag(ridge), weighted.T @ y).astype(np.float32)
