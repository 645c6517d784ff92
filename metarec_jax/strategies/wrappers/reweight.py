"""Reweighting: how much to trust each support example, learned by the meta-gradient."""

import jax
import jax.numpy as jnp

from metarec_jax.strategies.networks import dense, run
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, Task


def reweighted(strategy: Strategy, *, hidden: int = 16) -> Strategy:
    """Wrap `strategy` so that a small network weights the examples of its support set.

        w_i = 2 sigmoid(g(y_i, s_i, y_i s_i, mean y of the user, log(1 + n_u)))

    g is a network with one hidden layer. s_i is the score of the example before adaptation, so the weight depends on
    how much the example surprises the shared model. All weights start at 1. g is trained with all other parameters by
    the gradient of the query loss through the adaptation, which does not flow through s.

    Trained on clean queries with support sets that contain errors (`noise` of `metarec_jax.training.fit`), it learns to
    recognise errors: see `metarec_jax.reweight`.

    Args:
      strategy: one that reads `mask` as weights, see `Examples`.
      hidden: units of the hidden layer.

    Differs from the paper:
      - Ren et al. have no weighting network, but one meta-gradient for each example.
      - The network of Shu et al. reads the loss alone.

    References:
      Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018, section 3.
      Shu et al., Meta-Weight-Net, NeurIPS 2019, section 2.2.
    """

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        weight = dense(second, 5, hidden, 1)
        weight[-1]["weight"] = jnp.zeros_like(weight[-1]["weight"])
        return {"strategy": strategy.init(first), "weight": weight}

    def weighted(params: Params, support: Examples, key: jax.Array) -> Examples:
        keep = support.mask > 0
        target = jnp.where(keep, support.target, 0.0)
        shared, empty = (
            jax.lax.stop_gradient(params["strategy"]),
            support._replace(mask=jnp.zeros_like(support.mask)),
        )
        scores = strategy.predict(shared, strategy.adapt(shared, empty, key), support.features)
        scores = jax.lax.stop_gradient(jnp.where(keep, scores, 0.0))
        count = keep.sum(1, keepdims=True).astype(target.dtype)
        mean = target.sum(1, keepdims=True) / jnp.maximum(count, 1)
        inputs = jnp.stack(jnp.broadcast_arrays(target, scores, target * scores, mean, jnp.log1p(count)), -1)
        weight = 2 * jax.nn.sigmoid(run(params["weight"], inputs)[..., 0])
        return support._replace(mask=jnp.where(keep, support.mask * weight, 0.0))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return strategy.adapt(params["strategy"], weighted(params, support, key), key)

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return strategy.predict(params["strategy"], adapted, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return strategy.loss(params["strategy"], Task(weighted(params, task.support, key), task.query), key)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        return strategy.deviation(params["strategy"], adapted, features)

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        assert strategy.sample is not None
        return strategy.sample(params["strategy"], adapted, keys, strength)

    return Strategy(
        init,
        adapt,
        predict,
        meta_loss,
        deviation if strategy.deviation else None,
        sample=sample if strategy.sample else None,
    )
