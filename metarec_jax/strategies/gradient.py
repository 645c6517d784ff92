"""Gradient-based strategies: MAML, FOMAML, ANIL and MeLU are one inner loop over different groups of parameters."""

from collections.abc import Callable, Collection
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
    """SGD with `scale` over the curvature of the loss: 0.1 for the logistic loss, 0.0125 for the squared error.

    A model's biases all move its score together, so that the largest stable step falls with the loss's curvature times
    their number; steps of one size for all losses diverge for the steeper one.
    """
    return optax.sgd(scale / (curvature(loss) or 0.25))


def curvature(loss: PointwiseLoss) -> float:
    """Second derivative of a loss in the score, where score and target are 0; 0 for a loss without curvature there."""
    return max(float(jax.grad(jax.grad(loss))(0.0, 0.0)), 0.0)


def leaves_of(model: Model, groups: Collection[str]) -> Callable[[Params], Params]:
    """The function from a model's parameters to bools, one for each array: whether it is in one of the groups.

    Raises:
      ValueError: unknown groups, or a model without `groups`; from the function: no parameters are in the groups.
    """
    if unknown := set(groups) - set(ALL):
        raise ValueError(f"groups: {sorted(unknown)} unknown; choose from {', '.join(ALL)}")
    if set(groups) != set(ALL) and model.groups is None:
        raise ValueError(
            f"adapting only {sorted(groups)} needs a model with `groups`; pass Model(init, apply, groups=...)"
        )

    def chosen(params: Params) -> Params:
        if set(groups) == set(ALL):
            return jax.tree.map(lambda _: True, params)
        assert model.groups is not None
        flags = jax.tree.map(lambda group: group in groups, model.groups(params))
        if not any(jax.tree.leaves(flags)):
            raise ValueError(f"the model has no parameters in the groups {sorted(groups)}")
        return flags

    return chosen


def from_adapt(
    model: Model,
    loss: PointwiseLoss,
    init: Callable[[jax.Array], Params],
    adapt: Callable[[Params, Examples, jax.Array], Adapted],
) -> Strategy:
    """The strategy whose `adapt` is a `core.adapt` of `params["model"]` and whose meta-loss is the query loss."""

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
    """MAML with parameters of the inner loop that are meta-learned beside the model's.

    Args:
      model, loss, groups: see `maml`.
      learned: `learned(fast)`, the initial values of those parameters, from the arrays that adapt.
      options: `options(params)`, keyword arguments of `core.adapt`: optimiser, steps, step sizes and the like.
    """
    adapted_leaves = leaves_of(model, groups)

    def init(key: jax.Array) -> Params:
        params = model.init(key)
        return {"model": params} | learned(core.partition(params, adapted_leaves(params)))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        own = params["model"]
        return core.adapt(model.apply, own, support, loss=loss, adapted=adapted_leaves(own), **options(params))

    return from_adapt(model, loss, init, adapt)


def one_each(fast: Params) -> Params:
    """A zero for each array: the logarithm of a factor that starts at 1."""
    return jax.tree.map(lambda _: jnp.zeros(()), fast)


def maml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
    first_order: bool = False,
    groups: Collection[str] = ALL,
    count: float = 0.0,
    form: Params = "auto",
) -> Strategy:
    """Model-agnostic meta-learning with the exact second-order meta-gradient.

        w_u = theta after `steps` inner steps on user u's mean support loss;   meta-loss = mean_u L_query(w_u)

    Args:
      model: `init` and `apply`; `groups` too, unless every parameter adapts.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`). Give Adam an `eps_root` (1e-8):
        its square root has no derivative where a gradient is zero, and the meta-gradient would be NaN.
      steps: inner steps.
      learn_step_size: meta-learn one factor for each adapted parameter array, which multiplies the inner optimiser's
        updates and starts at 1 (Antoniou et al., How to train your MAML, ICLR 2019, section 4).
      first_order: treat inner gradients as constants.
      groups: which groups of parameters adapt; the rest is shared by all users and never copied.
      count: adds to the number of examples in the mean of the support loss, so that a user moves the less the fewer
        examples there are: a step size that suits thirty is far too long for one. 0 is the mean, as published; a count
        of 5 serves users of few examples much better (benchmarks/RESULTS.md). Adam's steps it leaves as they are.
      form: how adapted weights are held, see `core.adapt`; the result is the same.

    The loss's aux has `failed`, how many users met a non-finite number in the inner loop and were not adapted.

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
    """
    inner = default_inner(loss) if inner is None else inner

    def learned(fast: Params) -> dict[str, Params]:
        return {"log_step_size": one_each(fast)} if learn_step_size else {}

    def options(params: Params) -> dict[str, Any]:
        size = jax.tree.map(jnp.exp, params["log_step_size"]) if learn_step_size else 1.0
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
    learn_step_size: bool = True,
    groups: Collection[str] = ALL,
    count: float = 0.0,
) -> Strategy:
    """`maml` without the second-order terms: the query gradient at the adapted weights.

    Finn et al., 2017, section 5.2. A learned step size gets its gradient with the inner gradients as
    constants too: exact for one step.
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
    )


def anil(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
    count: float = 0.0,
) -> Strategy:
    """`maml` that adapts the head only (Raghu et al., Rapid Learning or Feature Reuse?, ICLR 2020)."""
    return maml(
        model, loss=loss, inner=inner, steps=steps, learn_step_size=learn_step_size, groups=("head",), count=count
    )


def melu(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
    count: float = 0.0,
) -> Strategy:
    """`maml` that shares the embeddings and adapts the decision layers and the head (Lee et al., MeLU, KDD 2019)."""
    return maml(
        model,
        loss=loss,
        inner=inner,
        steps=steps,
        learn_step_size=learn_step_size,
        groups=("decision", "head"),
        count=count,
    )
