"""Model transfer: plain training on everybody, then, or never, fine-tuning to each user: all of it, the head, LoRA."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import ALL, default_inner, leaves_of, maml
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task

Loss = Callable[[Params, Task, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def pretrain(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error) -> Strategy:
    """Plain training, without any adaptation: what the others of this file start from, and must beat.

        theta = argmin mean_u mean_{i in support and query of u} loss(f(x_i), y_i);   score(x) = f(x)

    A user counts once, however many examples it has, as in every other strategy's loss. All strategies of this file
    have the same parameters and the same loss, so that a model trained with one can be adapted with another.

    Args:
      model: `init` and `apply`.
      loss: elementwise loss of scores and targets.
    """

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return jnp.zeros((support.mask.shape[0], 0))

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return model.apply(params["model"], features)

    def init(key: jax.Array) -> Params:
        return {"model": model.init(key)}

    return Strategy(init, adapt, predict, _loss_of_all(model, loss), contrast=False, outer="shared")


def finetune(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 2,
    groups: Collection[str] = ALL,
    count: float = 0.0,
) -> Strategy:
    """`pretrain`, and each user's own copy is trained further on the user's support set.

        w_u = theta after `steps` inner steps on user u's mean support loss, theta as in `pretrain`

    What is adapted and how is that of `maml`; training knows nothing of it, so its gradient is that of plain training.

    Args:
      model: `init` and `apply`; `groups` too, unless every parameter adapts.
      loss: elementwise loss of scores and targets.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps. Training does not see them, so nothing keeps many of them from overfitting to a few examples;
        users with dozens of examples are served better by more.
      count: see `maml`.
      groups: which groups of parameters adapt.

    Raises:
      ValueError: unknown groups, or a model without `groups` where they are needed.
    """
    tuned = maml(
        model, loss=loss, inner=inner, steps=steps, learn_step_size=False, first_order=True, groups=groups, count=count
    )
    return tuned._replace(loss=_loss_of_all(model, loss), outer="shared")


def finetune_head(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 10,
    count: float = 0.0,
) -> Strategy:
    """`finetune` of the head only: the layers below are features that were learned on everybody.

    A head alone moves the scores less by each step than the whole model does, so that it takes more of them.
    """
    return finetune(model, loss=loss, inner=inner, steps=steps, groups=("head",), count=count)


class LowRank(NamedTuple):
    """A model's parameters, and the factors of each low-rank change under the number of the leaf that it changes."""

    model: Params
    a: Params  # {leaf: [in, rank]}
    b: Params  # {leaf: [rank, out]}


def lora(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 10,
    rank: int = 4,
    groups: Collection[str] = ("decision", "head"),
    seed: int = 0,
    count: float = 0.0,
) -> Strategy:
    """`finetune` that changes each weight matrix by one of low rank.

        W_u = W + A_u B_u,   A_u [in, rank] starts at A ~ N(0, 1 / in), the same for all users,   B_u [rank, out] at 0

    A_u and B_u take the inner steps, W is shared. Leaves of fewer axes (biases), and matrices of which a side is no
    longer than `rank` (a head with one output), adapt as they are, because the factors would be no smaller; the paper
    freezes them.

    Args:
      model: `init`, `apply` and `groups`.
      loss: elementwise loss of scores and targets.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps; the first moves B_u only, as the gradient of A_u is 0 where B_u is.
      count: see `maml`.
      rank: columns of A_u.
      groups: which groups of parameters adapt. Tables are left out: A_u would have as many rows as they have.
      seed: draws A.

    Raises:
      ValueError: a rank below 1, unknown groups, or a model without `groups` where they are needed.

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, section 4.1.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    inner, adapted_leaves = default_inner(loss) if inner is None else inner, leaves_of(model, groups)

    def start(params: Params) -> tuple[LowRank, LowRank]:
        """Where a user's adaptation starts, and which of it adapts."""
        flags, tree = jax.tree.flatten(adapted_leaves(params["model"]))
        leaves = enumerate(zip(jax.tree.leaves(params["model"]), flags, strict=True))
        low = {i: w for i, (w, flag) in leaves if flag and w.ndim == 2 and min(w.shape) > rank}
        # A is drawn here and no parameter: its gradient is 0, and a weight penalty would shrink it to nothing
        keys = {i: jax.random.fold_in(jax.random.key(seed), i) for i in low}
        a = {i: jax.random.normal(keys[i], (len(w), rank), w.dtype) / len(w) ** 0.5 for i, w in low.items()}
        b = {i: jnp.zeros((rank, w.shape[1]), w.dtype) for i, w in low.items()}
        whole = jax.tree.unflatten(tree, [flag and i not in low for i, flag in enumerate(flags)])
        return LowRank(params["model"], a, b), LowRank(whole, True, True)

    def apply(low: LowRank, features: Features) -> jax.Array:
        leaves, tree = jax.tree.flatten(low.model)
        for i, a in low.a.items():
            leaves[i] += a @ low.b[i]
        return model.apply(jax.tree.unflatten(tree, leaves), features)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        low, adapted = start(params)
        return core.adapt(
            apply, low, support, loss=loss, optimizer=inner, steps=steps, adapted=adapted, first_order=True,
            count=count, form="plain",
        )  # fmt: skip

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return core.predict(apply, start(params)[0], adapted, features)

    return pretrain(model, loss=loss)._replace(adapt=adapt, predict=predict, contrast=True)


def _loss_of_all(model: Model, loss: PointwiseLoss) -> Loss:
    """Mean over users of the shared model's mean loss on all examples of a user, support and query together."""
    truth = as_truth(loss)

    def mean(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        # scored apart and joined: an example of the support set may carry features that the query's do not share
        scores, target, mask = (
            jnp.concatenate(pair, axis=1)
            for pair in zip(
                *(
                    (model.apply(params["model"], e.features), e.target, e.mask)
                    for e in (truth(task.support), task.query)
                ),
                strict=True,
            )
        )
        return core.query_loss(scores, Examples(None, target, mask), loss), {}

    return mean
