"""Labels: what each rating of a support set is worth as evidence of a click, learned by the meta-gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.tasks import Examples, Features, Params, Task

LABELS = "labels"  # their place among the parameters


def with_labels(strategy: Strategy, at: Sequence[float], start: Sequence[float]) -> Strategy:
    """`strategy`, whose support targets pass through a piecewise linear function first (soft binning).

        y' = sum_k v_k hat_k(y),   hat_k the hat function of knot k

    The values v are trained with all else by the gradient of the query loss through the adaptation: five stars may be
    worth more than a click, and three less than none. Query targets stay as they are.

    Args:
      strategy: one whose parameters are a dict; if its meta-gradient does not reach the support targets, `start` stays.
      at: the knots, ascending.
      start: initial values there.
    """
    knots = np.asarray(at, np.float32)
    if len(knots) != len(start) or len(knots) < 2 or not (np.diff(knots) > 0).all():
        raise ValueError(f"need two or more ascending knots and a value for each, got {at} and {start}")

    def init(key: jax.Array) -> Params:
        params = strategy.init(key)
        if not isinstance(params, dict) or LABELS in params:
            raise TypeError(f"the parameters must be a dict without {LABELS!r}; other strategies: train(graded=False)")
        return {**params, LABELS: jnp.asarray(start, jnp.float32)}

    def own(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != LABELS}

    def labelled(params: Params, support: Examples) -> Examples:
        target = jnp.where(support.mask > 0, support.target, knots[0])
        return support._replace(target=jnp.interp(target, knots, params[LABELS]).astype(target.dtype))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return strategy.adapt(own(params), labelled(params, support), key)

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return strategy.predict(own(params), adapted, features)

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return strategy.loss(own(params), task._replace(support=labelled(params, task.support)), key)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        return strategy.deviation(own(params), adapted, features)

    return Strategy(init, adapt, predict, loss, deviation if strategy.deviation else None)
