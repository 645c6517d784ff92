"""Reweighting: how far to trust each support example, learned by the meta-gradient."""

import jax
import jax.numpy as jnp

from metarec_jax.strategies.networks import dense, run
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, Task


def reweighted(strategy: Strategy, *, hidden: int = 16) -> Strategy:
    """`strategy` on a support set whose examples are weighed.

        w_i = 2 sigmoid(g(y_i, s_i, y_i s_i, mean y of the user, log(1 + n_u)))

    g is a network with one hidden layer; s_i is the score of the example before adaptation: an example is judged by how
    much it surprises the shared model. All weights are 1 at first, and g is trained with all else by the gradient of
    the query loss through the adaptation; it does not pass through s.

    Trained on clean queries with support sets that hold errors (`noise` of `metarec_jax.training.fit`), it learns what
    an error looks like: see `metarec_jax.reweight`.

    Args:
      strategy: one that reads `mask` as weights, see `Examples`.
      hidden: units of the hidden layer.

    References:
      Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018, section 3 (there the weights have
      no network: one meta-gradient for each example).
      Shu et al., Meta-Weight-Net, NeurIPS 2019, section 2.2 (there g reads the loss alone).
    """

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        weight = dense(second, 5, hidden, 1)
        weight[-1]["weight"] = jnp.zeros_like(weight[-1]["weight"])
        return {"strategy": strategy.init(first), "weight": weight}

    def clean(params: Params, support: Examples, key: jax.Array) -> Examples:
        keep = support.mask > 0
        target = jnp.where(keep, support.target, 0.0)
        start, empty = jax.lax.stop_gradient(params["strategy"]), support._replace(mask=jnp.zeros_like(support.mask))
        scores = strategy.predict(start, strategy.adapt(start, empty, key), support.features)
        scores = jax.lax.stop_gradient(jnp.where(keep, scores, 0.0))
        count = keep.sum(1, keepdims=True).astype(target.dtype)
        mean = target.sum(1, keepdims=True) / jnp.maximum(count, 1)
        inputs = jnp.stack(jnp.broadcast_arrays(target, scores, target * scores, mean, jnp.log1p(count)), -1)
        weight = 2 * jax.nn.sigmoid(run(params["weight"], inputs)[..., 0])
        return support._replace(mask=jnp.where(keep, support.mask * weight, 0.0))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return strategy.adapt(params["strategy"], clean(params, support, key), key)

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return strategy.predict(params["strategy"], adapted, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return strategy.loss(params["strategy"], Task(clean(params, task.support, key), task.query), key)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        return strategy.deviation(params["strategy"], adapted, features)

    return Strategy(init, adapt, predict, meta_loss, deviation if strategy.deviation else None)
