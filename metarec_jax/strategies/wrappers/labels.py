"""Labels: what each rating of a support set is worth as evidence of a click, learned by the meta-gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, Task

SHIFTS = "label_shifts"  # their place among the parameters


def with_labels(strategy: Strategy, at: Sequence[float], start: Sequence[float]) -> Strategy:
    """`strategy`, whose support targets pass through a piecewise linear function first (soft binning).

        y' = sum_k (start_k + d_k) hat_k(y),   hat_k the hat function of knot k

    The shifts d, at first 0, are trained with all else by the gradient of the query loss through the adaptation: five
    stars may be worth more than a click, and three less than none. A penalty draws them to `start`, where they stay if
    the meta-gradient does not reach the support targets (fomaml, fine-tuning). Query targets stay as they are.

    Args:
      strategy: one whose parameters are a dict.
      at: the knots, ascending.
      start: the values there before training.
    """
    if strategy.labelled:
        raise ValueError("this strategy has labels already; they would be read as grades")
    knots, begin = np.asarray(at, np.float32), np.asarray(start, np.float32)
    if len(knots) != len(start) or len(knots) < 2 or not (np.diff(knots) > 0).all():
        raise ValueError(f"need two or more ascending knots and a value for each, got {at} and {start}")

    def init(key: jax.Array) -> Params:
        params = strategy.init(key)
        if not isinstance(params, dict) or SHIFTS in params:
            raise TypeError(f"the parameters must be a dict without {SHIFTS!r}; other strategies: train(graded=False)")
        return {**params, SHIFTS: jnp.zeros(len(begin))}

    def own(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != SHIFTS}

    def labelled(params: Params, support: Examples) -> Examples:
        target = jnp.where(support.mask > 0, support.target, knots[0])
        return support._replace(target=jnp.interp(target, knots, begin + params[SHIFTS]).astype(target.dtype))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return strategy.adapt(own(params), labelled(params, support), key)

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return strategy.predict(own(params), adapted, features)

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return strategy.loss(own(params), task._replace(support=labelled(params, task.support)), key)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        return strategy.deviation(own(params), adapted, features)

    def items(params: Params, features: Features) -> Any:
        assert strategy.items is not None
        return strategy.items(own(params), features)

    def score(params: Params, adapted: Adapted, side: Any) -> jax.Array:
        assert strategy.score is not None
        return strategy.score(own(params), adapted, side)

    return strategy._replace(
        init=init,
        adapt=adapt,
        predict=predict,
        loss=loss,
        deviation=deviation if strategy.deviation else None,
        labelled=True,
        items=items if strategy.items else None,
        score=score if strategy.score else None,
    )


def shifts_of_labels(arrays: Mapping[str, np.ndarray], start: np.ndarray) -> dict[str, np.ndarray]:
    """The shifts of a model that was saved when its arrays still held the values, start + d, under "labels"."""
    old = "['labels']"
    return {
        name.removesuffix(old) + f"[{SHIFTS!r}]": values - start
        for name, values in arrays.items()
        if name.startswith("params") and name.endswith(old) and values.shape == start.shape
    }
