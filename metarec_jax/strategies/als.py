"""ALS: matrix factorisation of ratings, with a user's bias and vector folded in in closed form."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.collaborative import factorise
from metarec_jax.core import query_loss
from metarec_jax.core.solve import inverse_cholesky, normal_per_key, solve
from metarec_jax.data.schema import ITEM_ID
from metarec_jax.models.model import Model
from metarec_jax.models.profile import look_up
from metarec_jax.strategies.ials import CONTENT, need_design, ridge_regression
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task

HELD_OUT = 4  # one in this many training users estimates the noise and the covariance


class Taste(NamedTuple):
    """Posterior of each user's taste: ratings are `mean + b(x) + taste . [1, v(x)]`.

    Attributes:
      value: `[users, 1 + rank]` the user's bias and vector.
      precision: `[users, 1 + rank, 1 + rank]` posterior precision, in units of the noise; None with the prior "ridge".
    """

    value: jax.Array
    precision: jax.Array | None


def als(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    rank: int = 8,
    penalty: float = 8.0,
    shrink: float = 5.0,
    sweeps: int = 15,
    prior: Literal["population", "ridge"] = "population",
    learn: bool = False,
) -> Strategy:
    """Matrix factorisation of ratings; items are fitted once, users are folded in.

        r(x) = mean + b(x) + taste . z(x),   z = [1, v(x)]
        taste = (sum_S w z z' + s^2 C^-1)^-1 sum_S w z (y - mean - b)

    mean, b and the item vectors V come from alternating least squares on the training users (`factorise.explicit_als`);
    y and w are the target and the weight of an example. The taste, a user's bias and vector, has the prior N(0, C), and
    ratings have noise of variance s^2. Expectation maximisation (`population`) estimates C and s^2 on a quarter of the
    training users, with V fitted to the others. `deviation` combines the posterior and the noise.

    With the prior "ridge", C is not used. As in the baseline "ALS fold-in", first b_u is estimated, then u:

        b_u = sum_S w (y - mean - b) / (sum_S w + shrink)
        u = (sum_S w v v' + penalty I)^-1 sum_S w v (y - mean - b - b_u)

    A new item gets its bias and vector from a ridge regression on its fields.

    Args:
      model: one without parameters, `design`: its `embed` reads the items' fields.
      loss: squared error.
      rank: width of the vectors.
      penalty, shrink, sweeps: of the alternating least squares.
      prior: prior of a user's taste, "population" or "ridge".
      learn: meta-train factors of s^2 C^-1, or of penalty and shrink, which start at 1, on users that the item vectors
        were not fitted to. Otherwise nothing is trained by gradients, and training ends with the fit.

    Raises:
      ValueError: another loss or prior; the model has parameters; a number is not positive.

    Differs from the paper:
      - The penalty is a constant; Zhou et al. multiply it by the number of ratings.
      - Biases of users and items are added (Koren).
      - The default prior of a user is estimated from other users (Laird and Ware).

    References:
      Zhou et al., Large-Scale Parallel Collaborative Filtering for the Netflix Prize, AAIM 2008.
      Koren, Factorization Meets the Neighborhood, KDD 2008, equation 1 (biases).
      Laird and Ware, Random-Effects Models for Longitudinal Data, Biometrics 1982 (C and the noise).
    """
    if loss is not optax.losses.squared_error:
        raise ValueError('als predicts ratings: train it with objective="rating"')
    need_design(model, "als")
    if rank < 1 or sweeps < 1 or penalty <= 0 or shrink <= 0:
        raise ValueError(f"need positive numbers, got {rank=}, {penalty=}, {shrink=}, {sweeps=}")
    if prior not in ("population", "ridge"):
        raise ValueError(f'prior is "population" or "ridge", got {prior!r}')
    embed, width = model.embed, 1 + rank
    assert embed is not None

    def factors(observed: Observed, sweeps: int = sweeps) -> factorise.RatingFactors:
        return factorise.explicit_als(
            observed.user, observed.item, observed.grade.astype(float), observed.items, rank,
            penalty=penalty, shrink=shrink, sweeps=sweeps,
        )  # fmt: skip

    def fit(observed: Observed) -> Params:
        mean, bias, vectors = factors(observed)
        count, columns = np.bincount(observed.item, minlength=observed.items), np.asarray(embed({}, observed.features))
        item_table = np.concatenate([bias[:, None], vectors], 1)
        content = ridge_regression(columns, item_table, CONTENT, count)
        item_table = np.where(count[:, None] > 0, item_table, columns @ content)
        item_table[0] = 0  # the unknown item, which `sides` reads from its fields
        table = {"mean": mean, "items": item_table, "content": content}
        if prior == "population":
            covariance, noise = spread(observed)
            table |= {"precision": noise * np.linalg.inv(covariance), "noise": noise}
        return {name: np.asarray(value, np.float32) for name, value in table.items()}

    def spread(observed: Observed) -> tuple[np.ndarray, float]:
        """Estimate the covariance of tastes and the noise variance on a quarter of the users, by the others' items."""
        held_out = np.arange(observed.users) % HELD_OUT == 0
        sample = observed.of(np.flatnonzero(held_out))
        if held_out.all() or not len(sample.user):
            return np.eye(width), 1.0
        mean, bias, vectors = factors(observed.of(np.flatnonzero(~held_out)), min(sweeps, 5))
        z = np.concatenate([np.ones((len(sample.item), 1)), vectors[sample.item]], 1)
        return population(sample.user, z, sample.grade - mean - bias[sample.item])

    def init(key: jax.Array) -> Params:
        names = ("penalty",) if prior == "population" else ("penalty", "shrink")
        return {name: jnp.zeros(()) for name in names} if learn else {}

    def factor(params: Params, name: str) -> jax.Array:
        return jnp.exp(params[name]) if learn else jnp.ones(())

    def sides(params: Params, features: Features) -> jax.Array:
        """Return biases and vectors of items, `[..., 1 + rank]`."""
        fitted, unknown = params["tables"]["fitted"], lambda x: (x == 0).astype(jnp.float32)[..., None]
        stored = look_up(fitted["items"].__getitem__, features[ITEM_ID], "categorical")
        return stored + look_up(unknown, features[ITEM_ID], "categorical") * (embed({}, features) @ fitted["content"])

    def inputs(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        """Return the prediction for an unknown user, `[...]`, and z, which the taste is multiplied by."""
        side = sides(params, features)
        shared = params["tables"]["fitted"]["mean"] + side[..., 0]
        return shared, jnp.concatenate([jnp.ones_like(side[..., :1]), side[..., 1:]], -1)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Taste:
        keep, (shared, z) = support.mask > 0, inputs(params, support.features)
        weight, z = jnp.where(keep, support.mask, 0.0), jnp.where(keep[..., None], z, 0.0)
        rest = jnp.where(keep, support.target - shared, 0.0)
        gram, moment = jnp.einsum("unf,un,ung->ufg", z, weight, z), jnp.einsum("unf,un->uf", z, weight * rest)
        if prior == "population":
            precision = gram + factor(params, "penalty") * params["tables"]["fitted"]["precision"]
            return Taste(solve(precision, moment), precision)
        bias = moment[:, :1] / (gram[:, 0, :1] + factor(params, "shrink") * shrink)
        left = gram[:, 1:, 1:] + factor(params, "penalty") * penalty * jnp.eye(rank)
        return Taste(jnp.concatenate([bias, solve(left, moment[:, 1:] - bias * gram[:, 1:, 0])], 1), None)

    def predict(params: Params, taste: Taste, features: Features) -> jax.Array:
        shared, z = inputs(params, features)
        return shared + jnp.einsum("unf,uf->un", z, taste.value)

    def items(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        return inputs(params, features)

    def score(params: Params, taste: Taste, side: tuple[jax.Array, jax.Array]) -> jax.Array:
        return side[0] + taste.value @ side[1].T

    def deviation(params: Params, taste: Taste, features: Features) -> jax.Array:
        _, z = inputs(params, features)
        assert taste.precision is not None
        covariance = solve(taste.precision, jnp.broadcast_to(jnp.eye(width), taste.precision.shape))
        of_taste = jnp.einsum("unf,ufg,ung->un", z, covariance, z)
        return jnp.sqrt(params["tables"]["fitted"]["noise"] * (1 + jnp.maximum(of_taste, 0.0)))

    def sample(params: Params, taste: Taste, keys: jax.Array, strength: jax.Array) -> Taste:
        assert taste.precision is not None
        noise = jnp.sqrt(params["tables"]["fitted"]["noise"])
        drawn = noise * jnp.einsum("ugf,ug->uf", inverse_cholesky(taste.precision), normal_per_key(keys, width))
        return taste._replace(value=taste.value + strength * drawn)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = predict(params, adapt(params, task.support, key), task.query.features)
        return query_loss(scores, task.query, loss), {}

    return Strategy(
        init,
        adapt,
        predict,
        meta_loss,
        deviation if prior == "population" else None,
        items=items,
        score=score,
        fit=fit,
        sample=sample if prior == "population" else None,
    )


def population(user: np.ndarray, z: np.ndarray, y: np.ndarray, steps: int = 20) -> tuple[np.ndarray, float]:
    """Fit linear random effects by expectation maximisation.

        y = z . taste_u + e,   taste_u ~ N(0, C),   e ~ N(0, s^2)

    Args:
      user: `[n]` user rows, from 0.
      z: `[n, width]` inputs.
      y: `[n]` residuals.
      steps: iterations, from C = I / 10 of the variance of y.

    Returns:
      C `[width, width]` and s^2.
    """
    users, width = int(user.max()) + 1, z.shape[1]
    gram = factorise.gram_of(user, z, users)
    moment = np.stack([np.bincount(user, z[:, f] * y, users) for f in range(width)], 1)
    noise = float(y.var()) + 1e-6
    covariance = 0.1 * noise * np.eye(width)
    for _ in range(steps):
        posterior = np.linalg.inv(gram / noise + np.linalg.inv(covariance))
        mean = (posterior @ moment[..., None])[..., 0] / noise
        covariance = posterior.mean(0) + mean.T @ mean / users + 1e-8 * np.eye(width)
        error = y - (z * mean[user]).sum(1)
        noise = float((error @ error + (gram * posterior).sum()) / len(y)) + 1e-6
    return covariance + 1e-3 * np.trace(covariance) / width * np.eye(width), noise
