"""Labels: the value of each rating in a support set as evidence of a click, learned by the meta-gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, Task

SHIFTS = "label_shifts"  # key of the shifts among the parameters


def with_labels(strategy: Strategy, at: Sequence[float], start: Sequence[float]) -> Strategy:
    """Wrap `strategy` so that support targets pass through a learned piecewise linear function (soft binning).

        y' = sum_k (start_k + d_k) hat_k(y),   hat_k the hat function of knot k

    The shifts d, initially 0, are trained with all other parameters by the gradient of the query loss through the
    adaptation: five stars may count for more than a click, and three for less than none. A penalty draws the values to
    `start`. They stay there if the meta-gradient does not reach the support targets (fomaml, fine-tuning). Query
    targets are not changed.

    Args:
      strategy: one whose parameters are a dict.
      at: the knots, ascending.
      start: the values at the knots before training.

    Raises:
      ValueError: the strategy has labels already; the knots are fewer than two, not ascending or not as many as
        `start`.
      TypeError: from `init`, if the parameters are not a dict.
    """
    if strategy.labelled:
        raise ValueError("this strategy has labels already: a second with_labels would read them as grades")
    knots, start_values = np.asarray(at, np.float32), np.asarray(start, np.float32)
    if len(knots) != len(start) or len(knots) < 2 or not (np.diff(knots) > 0).all():
        raise ValueError(f"need two or more ascending knots and a value for each, got {at} and {start}")

    def init(key: jax.Array) -> Params:
        params = strategy.init(key)
        if not isinstance(params, dict) or SHIFTS in params:
            raise TypeError(f"the parameters must be a dict without {SHIFTS!r}; else use train(graded=False)")
        return {**params, SHIFTS: jnp.zeros(len(start_values))}

    def without_shifts(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != SHIFTS}

    def labelled(params: Params, support: Examples) -> Examples:
        target = jnp.where(support.mask > 0, support.target, knots[0])
        return support._replace(target=jnp.interp(target, knots, start_values + params[SHIFTS]).astype(target.dtype))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return strategy.adapt(without_shifts(params), labelled(params, support), key)

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return strategy.predict(without_shifts(params), adapted, features)

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return strategy.loss(without_shifts(params), task._replace(support=labelled(params, task.support)), key)

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert strategy.deviation is not None
        return strategy.deviation(without_shifts(params), adapted, features)

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        assert strategy.sample is not None
        return strategy.sample(without_shifts(params), adapted, keys, strength)

    def items(params: Params, features: Features) -> Any:
        assert strategy.items is not None
        return strategy.items(without_shifts(params), features)

    def score(params: Params, adapted: Adapted, side: Any) -> jax.Array:
        assert strategy.score is not None
        return strategy.score(without_shifts(params), adapted, side)

    return strategy._replace(
        init=init,
        adapt=adapt,
        predict=predict,
        loss=loss,
        deviation=deviation if strategy.deviation else None,
        labelled=True,
        items=items if strategy.items else None,
        score=score if strategy.score else None,
        sample=sample if strategy.sample else None,
    )


def shifts_of_labels(arrays: Mapping[str, np.ndarray], start: np.ndarray) -> dict[str, np.ndarray]:
    """Convert a saved model's old "labels" arrays, which held start + d, to the shifts d."""
    old = "['labels']"
    return {
        name.removesuffix(old) + f"[{SHIFTS!r}]": values - start
        for name, values in arrays.items()
        if name.startswith("params") and name.endswith(old) and values.shape == start.shape
    }
