"""Gradient-based strategies: MAML, FOMAML, ANIL and MeLU are one inner loop over different groups of parameters."""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.tasks import Examples, Features, Params, PointwiseLoss, Task

ALL = ("embedding", "decision", "head")


def default_inner(loss: PointwiseLoss) -> optax.GradientTransformation:
    """SGD with 0.025 over the curvature of the loss: 0.1 for the logistic loss, 0.0125 for the squared error.

    A model's biases all move its score together, so that the largest stable step falls with the loss's curvature times
    their number; steps of one size for all losses diverge for the steeper one.
    """
    return optax.sgd(0.025 / (curvature(loss) or 0.25))


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


def maml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
    first_order: bool = False,
    groups: Collection[str] = ALL,
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
      form: how adapted weights are held, see `core.adapt`; the result is the same.

    The loss's aux has `failed`, how many users met a non-finite number in the inner loop and were not adapted.

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
    """
    inner = default_inner(loss) if inner is None else inner
    adapted_leaves = leaves_of(model, groups)

    def init(key: jax.Array) -> Params:
        params = {"model": model.init(key)}
        if learn_step_size:
            fast = core.partition(params["model"], adapted_leaves(params["model"]))
            params["log_step_size"] = jax.tree.map(lambda _: jnp.zeros(()), fast)
        return params

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return core.adapt(
            model.apply,
            params["model"],
            support,
            loss=loss,
            optimizer=inner,
            steps=steps,
            adapted=adapted_leaves(params["model"]),
            step_size=jax.tree.map(jnp.exp, params["log_step_size"]) if learn_step_size else 1.0,
            first_order=first_order,
            form=form,
        )

    return from_adapt(model, loss, init, adapt)


def fomaml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
    groups: Collection[str] = ALL,
) -> Strategy:
    """`maml` without the second-order terms: the query gradient at the adapted weights.

    Finn et al., 2017, section 5.2. A learned step size still gets its exact gradient, which needs no second derivative.
    """
    return maml(
        model,
        loss=loss,
        inner=inner,
        steps=steps,
        learn_step_size=learn_step_size,
        first_order=True,
        groups=groups,
    )


def anil(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
) -> Strategy:
    """`maml` that adapts the head only (Raghu et al., Rapid Learning or Feature Reuse?, ICLR 2020)."""
    return maml(model, loss=loss, inner=inner, steps=steps, learn_step_size=learn_step_size, groups=("head",))


def melu(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
) -> Strategy:
    """`maml` that shares the embeddings and adapts the decision layers and the head (Lee et al., MeLU, KDD 2019)."""
    return maml(
        model,
        loss=loss,
        inner=inner,
        steps=steps,
        learn_step_size=learn_step_size,
        groups=("decision", "head"),
    )
