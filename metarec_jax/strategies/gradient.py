"""Gradient-based strategies: MAML, FOMAML, ANIL and MeLU, one inner loop over different groups of parameters."""

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task

ALL = ("embedding", "decision", "head")


def default_inner(loss: PointwiseLoss, scale: float = 0.025) -> optax.GradientTransformation:
    """Return SGD whose step is `scale` over the curvature of the loss.

    With the default scale this is 0.1 for the logistic loss and 0.0125 for the squared error. All biases of a model
    move its score together, so the largest stable step falls with their number times the curvature of the loss. A
    single step size for all losses diverges for the steeper one.
    """
    return optax.sgd(scale / (curvature(loss) or 0.25))


@lru_cache(maxsize=64)
def curvature(loss: PointwiseLoss) -> float:
    """Return the second derivative of a loss in the score at score = target = 0; 0 if the loss has none there."""
    return max(float(jax.jit(jax.grad(jax.grad(loss)))(0.0, 0.0)), 0.0)


def leaves_of(model: Model, groups: Collection[str]) -> Callable[[Params], Params]:
    """Return a function from a model's parameters to a pytree of bools: whether each array is in one of the groups.

    Raises:
      ValueError: unknown groups, or a model without `groups`. The returned function raises it too, if no parameter is
        in the groups.
    """
    if unknown := set(groups) - set(ALL):
        raise ValueError(f"groups: {sorted(unknown)} unknown; choose from {', '.join(ALL)}")
    if set(groups) != set(ALL) and model.groups is None:
        raise ValueError(
            f"adapting only {sorted(groups)} needs a model with `groups`; pass Model(init, apply, groups=...)"
        )

    def in_groups(params: Params) -> Params:
        if set(groups) == set(ALL):
            return jax.tree.map(lambda _: True, params)
        assert model.groups is not None
        flags = jax.tree.map(lambda group: group in groups, model.groups(params))
        if not any(jax.tree.leaves(flags)):
            raise ValueError(f"the model has no parameters in the groups {sorted(groups)}")
        return flags

    return in_groups


def from_adapt(
    model: Model,
    loss: PointwiseLoss,
    init: Callable[[jax.Array], Params],
    adapt: Callable[[Params, Examples, jax.Array], Adapted],
) -> Strategy:
    """Build a strategy whose `adapt` is a `core.adapt` of `params["model"]` and whose meta-loss is the query loss."""

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return core.predict(model.apply, params["model"], adapted, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        adapted = adapt(params, task.support, key)
        scores = predict(params, adapted, task.query.features)
        return core.query_loss(scores, task.query, loss), {"failed": adapted.failed.sum()}

    return Strategy(init, adapt, predict, meta_loss)


def from_inner_loop(
    model: Model,
    loss: PointwiseLoss,
    groups: Collection[str],
    learned: Callable[[Params], dict[str, Params]],
    options: Callable[[Params], dict[str, Any]],
) -> Strategy:
    """Build MAML with inner-loop parameters that are meta-learned beside the model's.

    Args:
      model, loss, groups: see `maml`.
      learned: `learned(fast)`, initial values of the inner-loop parameters, from the arrays that adapt.
      options: `options(params)`, keyword arguments of `core.adapt`: optimiser, steps, step sizes and the like.
    """
    adapted_leaves = leaves_of(model, groups)

    def init(key: jax.Array) -> Params:
        params = model.init(key)
        return {"model": params} | learned(core.partition(params, adapted_leaves(params)))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        theta = params["model"]
        return core.adapt(model.apply, theta, support, loss=loss, adapted=adapted_leaves(theta), **options(params))

    return from_adapt(model, loss, init, adapt)


def learns_step_size(faithful: bool, learn_step_size: bool | None, count: float) -> bool:
    """Return whether step sizes are meta-learned: `learn_step_size`; if that is None, unless `faithful`.

    Raises:
      ValueError: `faithful` with `learn_step_size=True` or a `count`, neither of which is in the paper.
    """
    if faithful and learn_step_size:
        raise ValueError(
            "faithful=True fixes the step size, and learn_step_size=True learns it; leave one of them at its default"
        )
    if faithful and count != 0:
        raise ValueError(f"faithful=True takes the plain mean support loss, got {count=}; leave count at 0")
    return not faithful if learn_step_size is None else learn_step_size


def one_each(fast: Params) -> Params:
    """Return a 0 for each array: the logarithm of a factor that starts at 1."""
    return jax.tree.map(lambda _: jnp.zeros(()), fast)


def maml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool | None = None,
    first_order: bool = False,
    groups: Collection[str] = ALL,
    count: float = 0.0,
    form: Params = "auto",
    faithful: bool = False,
) -> Strategy:
    """Model-agnostic meta-learning with the exact second-order meta-gradient.

        w_u = theta after `steps` inner steps on user u's mean support loss;   meta-loss = mean_u L_query(w_u)

    Args:
      model: `init` and `apply`; also `groups`, unless every parameter adapts.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`). Give Adam an `eps_root` (1e-8):
        its square root has no derivative where a gradient is zero, and the meta-gradient would be NaN.
      steps: inner steps.
      learn_step_size: meta-learn one factor per adapted parameter array. It multiplies the inner optimiser's updates
        and starts at 1. None: learn it unless `faithful`.
      first_order: treat inner gradients as constants.
      groups: which groups of parameters adapt; the rest is shared by all users and never copied.
      count: pseudo-count in the denominator of the mean support loss, so that users with few examples move less: a step
        size that suits thirty examples is far too long for one. 0 is the published mean; a count of 5 serves users with
        few examples much better (benchmarks/RESULTS.md). It does not change Adam's steps.
      form: how adapted weights are stored, see `core.adapt`; the result is the same.
      faithful: fix the step size, as in eq. 1 of the paper: `learn_step_size=False`, and no `count`.

    Raises:
      ValueError: unknown groups, a model without `groups` where they are needed, or `faithful` with a learned step size
        or a `count`.

    The aux of the loss has `failed`: how many users met a non-finite number in the inner loop and were not adapted.

    Differs from the paper:
      Step sizes are meta-learned by default, one per array, as in MAML++ (there per layer and step: Antoniou et al.,
      How to train your MAML, ICLR 2019, section 4). `faithful=True` fixes it.

    Example:
      The model x . w starts from w = 0. A user rates item 0 with 2: the gradient is -4, and the default step size for
      the squared error is 0.0125:

      >>> strategy = mr.maml(mr.Model(init=lambda key: jnp.zeros(2), apply=lambda w, x: x @ w), steps=1)
      >>> params = strategy.init(jax.random.key(0))
      >>> items = jnp.eye(2)[None]  # features [users, examples, width] of items 0 and 1
      >>> support = mr.Examples(items[:, :1], jnp.array([[2.0]]), jnp.ones((1, 1)))
      >>> adapted = jax.jit(strategy.adapt)(params, support, jax.random.key(1))
      >>> jax.jit(strategy.predict)(params, adapted, items)
      Array([[0.05, 0.  ]], dtype=float32)

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
    """
    inner = default_inner(loss) if inner is None else inner
    learns = learns_step_size(faithful, learn_step_size, count)

    def learned(fast: Params) -> dict[str, Params]:
        return {"log_step_size": one_each(fast)} if learns else {}

    def options(params: Params) -> dict[str, Any]:
        size = jax.tree.map(jnp.exp, params["log_step_size"]) if learns else 1.0
        return {
            "optimizer": inner, "steps": steps, "step_size": size, "first_order": first_order, "count": count,
            "form": form,
        }  # fmt: skip

    return from_inner_loop(model, loss, groups, learned, options)


def fomaml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool | None = None,
    groups: Collection[str] = ALL,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """First-order MAML: `maml` without second-order terms, with the query gradient at the adapted weights.

    Args:
      model, loss, inner, steps, learn_step_size, groups, count: see `maml`.
      faithful: fix the step size, as in section 5.2 of the paper; see `maml`.

    Differs from the paper:
      Step sizes are meta-learned by default, as in `maml`; `faithful=True` fixes them. Their gradient also treats inner
      gradients as constants, which is exact for one step.

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017, section 5.2.
    """
    return maml(
        model,
        loss=loss,
        inner=inner,
        steps=steps,
        learn_step_size=learn_step_size,
        first_order=True,
        groups=groups,
        count=count,
        faithful=faithful,
    )


def anil(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool | None = None,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """ANIL: `maml` that adapts the head only.

    Args:
      model, loss, inner, steps, learn_step_size, count: see `maml`.
      faithful: fix the step size, as in section 4.1 of the paper; see `maml`.

    Differs from the paper:
      Step sizes are meta-learned by default, as in `maml`; `faithful=True` fixes them.

    References:
      Raghu et al., Rapid Learning or Feature Reuse?, ICLR 2020.
    """
    return maml(
        model,
        loss=loss,
        inner=inner,
        steps=steps,
        learn_step_size=learn_step_size,
        groups=("head",),
        count=count,
        faithful=faithful,
    )


def melu(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool | None = None,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """MeLU: `maml` that shares the embeddings and adapts the decision layers and the head.

    Args:
      model, loss, inner, steps, learn_step_size, count: see `maml`.
      faithful: fix the step size, as in algorithm 1 of the paper; see `maml`.

    Differs from the paper:
      Step sizes are meta-learned by default, as in `maml` and MAML++; `faithful=True` fixes them.

    References:
      Lee et al., MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation, KDD 2019.
    """
    return maml(
        model,
        loss=loss,
        inner=inner,
        steps=steps,
        learn_step_size=learn_step_size,
        groups=("decision", "head"),
        count=count,
        faithful=faithful,
    )
