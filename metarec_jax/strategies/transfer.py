"""Transfer learning: one model trained on all users, then optionally fine-tuned to each (fully, head only, or LoRA)."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import ALL, default_inner, learns_step_size, leaves_of, maml
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task

Loss = Callable[[Params, Task, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def pretrain(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error) -> Strategy:
    """Train one shared model without adaptation: the start of the other strategies here, and their baseline.

        theta = argmin mean_u mean_{i in support and query of u} loss(f(x_i), y_i);   score(x) = f(x)

    Every user has the same weight however many examples they have, as in the loss of every other strategy. All
    strategies of this file have the same parameters and the same loss, so a model trained with one can be adapted with
    another.

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
    """Fine-tuning: `pretrain`, then each user's own copy is trained further on the user's support set.

        w_u = theta after `steps` inner steps on user u's mean support loss, theta as in `pretrain`

    Adaptation works as in `maml`. Training does not see it: its gradient is that of plain training.

    Args:
      model: `init` and `apply`; also `groups`, unless every parameter adapts.
      loss: elementwise loss of scores and targets.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps. Training does not see them, so nothing prevents many steps from overfitting to a few examples;
        users with dozens of examples do better with more.
      groups: which groups of parameters adapt.
      count: see `maml`.

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
    """Fine-tune the head only: the layers below are features learned on all users.

    A step changes the scores less with the head alone than with the whole model, so the default has more steps.
    """
    return finetune(model, loss=loss, inner=inner, steps=steps, groups=("head",), count=count)


class LowRank(NamedTuple):
    """A model's parameters, and the factors of each low-rank change keyed by the index of the leaf that it changes."""

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
    alpha: float | None = None,
    faithful: bool = False,
) -> Strategy:
    """LoRA: `finetune` with a low-rank change of each weight matrix.

        W_u = W + alpha / rank A_u B_u
        A_u [in, rank] starts at A ~ N(0, 1 / in), the same for all users,   B_u [rank, out] at 0

    The inner steps adapt A_u and B_u; W is shared. Leaves with fewer axes (biases) adapt directly. So do matrices with
    a side of at most `rank` (a head with one output), whose factors would be no smaller.

    Args:
      model: `init`, `apply` and `groups`.
      loss: elementwise loss of scores and targets.
      inner: inner optimiser, any optax transformation (default `default_inner(loss)`).
      steps: inner steps; the first moves B_u only, because the gradient of A_u is 0 where B_u is.
      rank: columns of A_u.
      groups: which groups of parameters adapt. Tables are excluded by default: their A_u would have as many rows as
        they have.
      seed: seed of A.
      count: see `maml`.
      alpha: numerator of the scale; None: rank, the scale is 1.
      faithful: adapt A_u and B_u of every matrix of the groups and nothing else, with the scale alpha / rank, as in
        equation 3 and section 4.1 of the paper. A user without support has B_u = 0.

    Raises:
      ValueError: a rank below 1, an alpha that is not positive, unknown groups, a model without `groups` where they are
        needed, or `faithful` with a `count`. `adapt` raises it if `faithful` finds no matrix in the groups.

    Differs from the paper:
      - Unless `faithful`, biases, and matrices no larger than their factors, adapt directly; the paper freezes them.
      - A_u starts at the same A for all users, with variance 1 / in; the paper trains one task and gives no variance.

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, section 4.1.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    learns_step_size(faithful, None, count)  # refuse a count
    inner, adapted_leaves = default_inner(loss) if inner is None else inner, leaves_of(model, groups)

    def start(params: Params) -> tuple[LowRank, LowRank]:
        """Return the initial values of a user's adaptation, and a mask of the leaves that adapt."""
        flags, tree = jax.tree.flatten(adapted_leaves(params["model"]))
        leaves = enumerate(zip(jax.tree.leaves(params["model"]), flags, strict=True))
        matrices = {i: w for i, (w, flag) in leaves if flag and w.ndim == 2 and (faithful or min(w.shape) > rank)}
        if faithful and not matrices:
            raise ValueError(f"faithful=True adapts matrices alone, and the groups {sorted(groups)} have none")
        # A is drawn here and is not a parameter: its gradient is 0, and a weight penalty would shrink it to zero
        keys = {i: jax.random.fold_in(jax.random.key(seed), i) for i in matrices}
        a = {i: jax.random.normal(keys[i], (len(w), rank), w.dtype) / len(w) ** 0.5 for i, w in matrices.items()}
        b = {i: jnp.zeros((rank, w.shape[1]), w.dtype) for i, w in matrices.items()}
        others = [flag and i not in matrices and not faithful for i, flag in enumerate(flags)]
        direct = jax.tree.unflatten(tree, others)
        return LowRank(params["model"], a, b), LowRank(direct, True, True)

    def apply(low: LowRank, features: Features) -> jax.Array:
        leaves, tree = jax.tree.flatten(low.model)
        for i, a in low.a.items():
            leaves[i] += a @ low.b[i] if alpha is None else alpha / rank * (a @ low.b[i])
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
    """Return the mean over users of the shared model's mean loss on support and query together."""
    as_constants = as_truth(loss)

    def mean(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        # scored separately, then joined: support examples may have features that query examples lack
        scores, target, mask = (
            jnp.concatenate(pair, axis=1)
            for pair in zip(
                *(
                    (model.apply(params["model"], e.features), e.target, e.mask)
                    for e in (as_constants(task.support), task.query)
                ),
                strict=True,
            )
        )
        return core.query_loss(scores, Examples(None, target, mask), loss), {}

    return mean
