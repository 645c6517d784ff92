"""Meta-learned structure: learn what adapts, how far, and which features a user needs, so that adaptation generalises.

Sparse MAML learns which weights the inner steps may change. Meta-regularised MAML learns how strongly they are pulled
back. Gated adaptation changes only a user's gates on shared features.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import need_embed
from metarec_jax.strategies.gradient import (
    ALL,
    default_inner,
    from_adapt,
    from_inner_loop,
    learns_step_size,
    one_each,
)
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss

MASKS = ("array", "row", "column", "weight")


def sparse_maml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    groups: Collection[str] = ALL,
    masks: str | None = None,
    start: float = 0.1,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """Sparse MAML: `maml` that learns which parameters adapt.

        w_{k+1} = w_k - a * 1[start + m >= 0] * grad L_support(w_k),   m = 0 before training

    The mask parameters m are trained with the initial parameters by a straight-through estimator: the derivative of the
    step function is taken to be 1 (Bengio et al., 2013), so that parameters switched off can be switched on again. a is
    the step of the inner optimiser times a learned factor for each array.

    Args:
      model: `init` and `apply`; also `groups`, unless every parameter may adapt.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps.
      groups: which groups of parameters may adapt.
      masks: one mask parameter for each "array", "row" of an array (an input of a layer, a code of a table), "column"
        (an output, a dimension of the embedding) or "weight". With "weight" every user needs a full copy of the adapted
        weights; with the others, fast weights of layers stay factored, see `core.adapt`. None: "row", or "weight" if
        `faithful`.
      start: 0 or more. Everything adapts at first, and keeps adapting until training moves its m below -start.
      count: see `maml`.
      faithful: learn one mask for each weight and fix the step size a, as in the paper's update
        w - a 1[m >= 0] * grad L, whose m starts at `start` here.

    Raises:
      ValueError: a negative `start`, unknown `masks` or `groups`, a model without `groups`, or `faithful` with other
        masks or a `count`.

    Differs from the paper, unless `faithful`:
      - Masks are shared by rows; the paper has one for each weight.
      - The step size has a learned factor for each array.

    References:
      von Oswald et al., Learning where to learn: Gradient sparsity in meta and continual learning, NeurIPS 2021,
      section 3.
    """
    if faithful and masks not in (None, "weight"):
        raise ValueError(f"faithful=True has one mask for each weight, got {masks=}; leave it out")
    masks = masks or ("weight" if faithful else "row")
    learns = learns_step_size(faithful, None, count)
    if masks not in MASKS:
        raise ValueError(f"masks must be one of {', '.join(MASKS)}, got {masks!r}")
    if start < 0:
        raise ValueError(f"start must be 0 or more, because nothing adapts at first below 0; got {start}")
    inner = default_inner(loss) if inner is None else inner

    def mask_params(w: jax.Array) -> jax.Array:
        shape = w.shape
        if masks == "array":
            shape = ()
        elif masks == "row":
            shape = (*shape[:1], *(1 for _ in shape[1:]))
        elif masks == "column":
            shape = shape[1:] or shape  # a layer's bias has one number for each output
        return jnp.zeros(shape)

    def learned(fast: Params) -> dict[str, Params]:
        masks = {"mask": jax.tree.map(mask_params, fast)}
        return masks | {"log_step_size": one_each(fast)} if learns else masks

    def options(params: Params) -> dict[str, Any]:
        mask = jax.tree.map(lambda m: straight_through(start + m), params["mask"])
        size = jax.tree.map(lambda m, s: m * jnp.exp(s), mask, params["log_step_size"]) if learns else mask
        form = "plain" if masks == "weight" else "auto"
        return {"optimizer": inner, "steps": steps, "step_size": size, "count": count, "form": form}

    return from_inner_loop(model, loss, groups, learned, options)


def straight_through(m: jax.Array) -> jax.Array:
    """Return `1[m >= 0]` with derivative 1."""
    return m - jax.lax.stop_gradient(m) + (m >= 0)


def meta_reg(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    groups: Collection[str] = ALL,
    penalty: float = 0.1,
    count: float = 0.0,
) -> Strategy:
    """MetaReg: `maml` with a meta-learned regulariser in the inner loss.

        w_u = theta after `steps` inner steps on  L_support(w) + sum_g lambda_g / 2 |w_g - theta_g|^2

    Each array g has one strength lambda_g, trained on the query loss: how far to move a user with few examples is a
    question of generalisation. Every array also has a learned step-size factor.

    Args:
      model: `init` and `apply`; also `groups`, unless every parameter adapts.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps.
      groups: which groups of parameters adapt.
      penalty: initial strength; the inner step size times it must stay below 2.
      count: see `maml`.

    Raises:
      ValueError: a penalty that is not positive, unknown `groups`, or a model without them.

    Differs from the paper:
      - The squared distance to the initial parameters is penalised; the paper penalises absolute weights of a head.
      - Initial parameters and strengths are trained together on the users' query sets; the paper learns on domains in
        turn.

    References:
      Balaji et al., MetaReg: Towards Domain Generalization using Meta-Regularization, NeurIPS 2018, section 3.
    """
    if penalty <= 0:
        raise ValueError(f"penalty must be more than 0, because its logarithm is learned; got {penalty}")
    inner = default_inner(loss) if inner is None else inner

    def learned(fast: Params) -> dict[str, Params]:
        return {"log_step_size": one_each(fast), "log_strength": one_each(fast)}  # the strength relative to `penalty`

    def options(params: Params) -> dict[str, Any]:
        size = jax.tree.map(jnp.exp, params["log_step_size"])
        # `proximal` sums updates before the step size multiplies them, so the pull has to be multiplied by it
        pull = jax.tree.map(lambda s, size: penalty * jnp.exp(s) * size, params["log_strength"], size)
        return {"optimizer": core.implicit.proximal(inner, pull), "steps": steps, "step_size": size, "count": count}

    return from_inner_loop(model, loss, groups, learned, options)


def gated(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    hidden: int = 32,
    count: float = 0.0,
) -> Strategy:
    """Gated adaptation: each user adapts only gates on shared features, and a bias.

        score(x) = f(x) + sum_j (g_uj - 1) v_j h_j(x) + b_u,   g_u = 1 + tanh(z_u)
        h(x) = [phi(x), relu(W phi(x) + c)];   z_u, b_u = (z, b) after `steps` inner steps on the mean support loss

    f is the shared model, phi its `embed`, h the features and v their weights in the score. A gate of 0 removes the
    feature's part of the score, 1 leaves it as for everybody, 2 doubles it. Every gate has a learned step size, so that
    features on which users agree are left alone. Gates select among shared features, so few examples cannot overfit
    them as they can a head.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps.
      hidden: number of features learned on top of phi.
      count: see `maml`.

    Raises:
      ValueError: the model lacks `embed` or `width`.

    References:
      Serra et al., Overcoming Catastrophic Forgetting with Hard Attention to the Task, ICML 2018 (gates per task).
      Zintgraf et al., Fast Context Adaptation via Meta-Learning, ICML 2019 (adapting only a vector per task).
    """
    embed, width = need_embed(model)
    inner = default_inner(loss) if inner is None else inner
    size = width + hidden

    def init_network(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        return {
            "model": model.init(keys[0]),
            "layer": jax.random.normal(keys[1], (width, hidden)) * (2 / width) ** 0.5,
            "shift": jnp.zeros(hidden),
            "worth": jax.random.normal(keys[2], (size,)),
            "gate": jnp.zeros(size),
            "bias": jnp.zeros(()),
        }

    def score(params: Params, features: Features) -> jax.Array:
        phi = embed(params["model"], features)
        h = jnp.concatenate([phi, jax.nn.relu(phi @ params["layer"] + params["shift"])], -1)
        correction = h @ (jnp.tanh(params["gate"]) * params["worth"]) + params["bias"]
        return model.apply(params["model"], features) + correction

    network = Model(init_network, score)

    def init(key: jax.Array) -> Params:
        return {"model": network.init(key), "log_step_size": {"gate": jnp.zeros(size), "bias": jnp.zeros(())}}

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        adapted = {name: name in ("gate", "bias") for name in params["model"]}
        return core.adapt(
            network.apply,
            params["model"],
            support,
            loss=loss,
            optimizer=inner,
            steps=steps,
            adapted=adapted,
            step_size={name: jnp.exp(params["log_step_size"][name]) if adapted[name] else 1.0 for name in adapted},
            count=count,
        )

    return from_adapt(network, loss, init, adapt)
