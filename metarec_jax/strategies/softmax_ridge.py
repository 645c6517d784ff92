"""Softmax ridge: a user vector by ridge regression on trained input vectors, scored with separate output vectors."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core.solve import solve
from metarec_jax.models.model import Model
from metarec_jax.strategies.ials import only_ranks
from metarec_jax.strategies.observed import popularity
from metarec_jax.strategies.smooth import at, positives, smooth
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss

Vector = tuple[jax.Array, jax.Array]  # [users, width], [users]


def softmax_ridge(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, penalty: float = 8.0) -> Strategy:
    """Ridge regression on input vectors phi, scored with output vectors psi, trained end to end through the solution.

        u = argmin sum_S t w (1 - u . phi(x))^2 + l |u|^2,   score(x) = f(x) + tau u . psi(x) + c log p(x)

    phi and psi are two copies of the network's `embed`, with the item's id and fields; f is the shared score of the
    second. l, tau and c are smooth functions of the number n of positives.

    Args:
      model: needs `embed`, such as `linear`.
      loss: not used: the strategy ranks.
      penalty: initial l.

    Raises:
      ValueError: the model lacks `embed`, or the penalty is not positive.

    References:
      Bertinetto et al., Meta-learning with Differentiable Closed-form Solvers, ICLR 2019 (the solver);
      Liang et al., Variational Autoencoders for Collaborative Filtering, WWW 2018 (the loss).
    """
    if model.embed is None:
        raise ValueError("softmax_ridge needs a model with `embed`, such as linear")
    if penalty <= 0:
        raise ValueError(f"penalty must be above 0, got {penalty}")
    embed = model.embed

    def init(key: jax.Array) -> Params:
        input_key, output_key = jax.random.split(key)
        numbers = {name: smooth() for name in ("penalty", "scale", "popularity")}
        return numbers | {
            "input": model.init(input_key),
            "output": model.init(output_key),
            "dislike": jnp.zeros(()),
        }

    def adapt(params: Params, support: Examples, key: jax.Array) -> Vector:
        count, keep = positives(support), support.mask > 0
        x = jnp.where(keep[..., None], embed(params["input"], support.features), 0.0)
        target = jnp.where(keep, support.target, 0.0)
        weight = jnp.where(keep, support.mask * jnp.exp((10 * params["dislike"] - 0.7) * (1 - target)), 0.0)
        ridge = (penalty * jnp.exp(at(params["penalty"], count)))[:, None, None] * jnp.eye(x.shape[-1])
        user = solve(jnp.einsum("unf,un,ung->ufg", x, weight, x) + ridge, jnp.einsum("unf,un->uf", x, weight * target))
        scale = 4 * jnp.exp(at(params["scale"], count))
        return scale[:, None] * user, 1 + at(params["popularity"], count)

    def predict(params: Params, adapted: Vector, features: Features) -> jax.Array:
        user, weight = adapted
        personal = jnp.einsum("unf,uf->un", embed(params["output"], features), user)
        return model.apply(params["output"], features) + personal + weight[:, None] * popularity(params, features)

    return Strategy(init, adapt, predict, only_ranks("softmax_ridge"), ranks=True)
