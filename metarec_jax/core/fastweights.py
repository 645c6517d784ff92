"""Fast weights in dual form: adapt each user's layers without forming per-user weight matrices.

An SGD step adds `-lr X^T D` to the weights of a dense layer, with X its inputs on the support set and D the loss
gradient at its outputs. So `x W' = x W - lr (x X^T) D`: one product shared by all users, and a low-rank correction for
each user.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import _trace
from metarec_jax.core._loop import Adapted, Explicit, Factored, Loop, as_precision, settled, with_precision
from metarec_jax.core._plan import PlainFormWarning, costs, make_plan, one_user
from metarec_jax.core._spmd import automatic, varying
from metarec_jax.core._trace import Site
from metarec_jax.core.inner import check_count, partition
from metarec_jax.core.outer import joined, pieces
from metarec_jax.types import Apply, Examples, Features, Params, PointwiseLoss

__all__ = [
    "Adapted",
    "Explicit",
    "Factored",
    "PlainFormWarning",
    "adapt",
    "costs",
    "mean_change",
    "predict",
    "settled",
    "weights",
]


def adapt(
    apply: Apply,
    params: Params,
    support: Examples,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 1,
    adapted: Params = True,
    step_size: Params = 1.0,
    first_order: bool = False,
    count: float | jax.Array = 0.0,
    form: Params = "auto",
    precision: Any = None,
    remat: bool = False,
    chunk: int | None = None,
) -> Adapted:
    """Adapt the parameters to each user by `steps` optimiser steps on the support loss (MAML).

        w_0 = params;  w_{k+1} = w_k + step_size * optimizer(grad L_support(w_k))

    Computes what `inner.adapt` computes, faster. Weights of dense layers and embedding tables are found in the jaxpr of
    `apply` and kept factored. Exact to second order in `params` and `step_size`, in reverse mode.

    A user without support examples keeps the shared parameters. So does a user whose inner loop meets a non-finite
    number; that user adds nothing to any gradient.

    Args:
      apply: `apply(params, features) -> scores`, for one user: features `[examples, ...]`, scores `[examples]`.
      params: shared parameters, a pytree.
      support: support set, arrays `[users, examples, ...]`.
      loss: elementwise loss of scores and targets; its weighted mean over a user's support is minimised.
      optimizer: any optax transformation (default `optax.sgd(0.1)`). Layers stay factored if its updates are a fixed
        linear combination of the gradients: SGD, momentum, schedules, also with a learned learning rate.
      steps: number of inner steps. The program grows with its square if the input of a factored layer changes between
        steps.
      adapted: which leaves adapt: a pytree of Python bools, or a prefix of one (True: all of them).
      step_size: multiplies the updates; a scalar or array, or a pytree prefix of the adapted leaves. Layers stay
        factored with a step size per layer, per column `[out]` or per row `[in, 1]`, but not with one per weight.
      first_order: drop the second-order terms of the meta-gradient (FOMAML).
      count: pseudo-count in the denominator of the support mean, 0 or more; 0 is the published mean. It shrinks the
        steps of users with few examples, as a posterior mean does. It has little effect on optimisers whose steps do
        not depend on the gradient's scale, such as Adam.
      form: "auto" (the cheaper by `costs`), "dual" (factored) or "plain" (per-user values), or a pytree prefix of the
        adapted leaves.
      precision: of the matrix products outside loops and branches of `apply`: a `jax.lax.Precision`, or `jnp.bfloat16`
        for bfloat16 inputs with float32 sums.
      remat: recompute the inner steps in the backward pass instead of storing their activations.
      chunk: users adapted at a time, to bound memory; see also `outer.chunked`.

    Returns:
      `Adapted`; every array has the users' axis first.

    Raises:
      ValueError: `steps` or `count` is negative, `chunk` is less than 1, or `form` or `precision` is unknown.

    Example:
      One user with the example x = 1, y = 2, and the model w x from w = 0. The gradient of (w x - y)^2 is -4, so a step
      of 0.1 moves w to 0.4:

      >>> support = mr.Examples(jnp.ones((1, 1, 1)), jnp.array([[2.0]]), jnp.ones((1, 1)))  # one user, one example
      >>> adapted = mr.core.adapt(lambda w, x: x @ w, jnp.zeros(1), support)
      >>> mr.core.weights(jnp.zeros(1), adapted)
      Array([[0.4]], dtype=float32)

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
      Li et al., Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    check_count(count)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    inner, precision = optax.sgd(0.1) if optimizer is None else optimizer, as_precision(precision)

    def run(params: Params, step_size: Params, count: float | jax.Array, support: Examples) -> Adapted:
        params, users = varying(params, support.mask), support.mask.shape[0]
        leaves, start = jax.tree.leaves(params), partition(params, adapted)
        if steps == 0 or not jax.tree.leaves(start):
            return Adapted((None,) * len(leaves), jnp.zeros(users, bool), precision)
        plan = make_plan(apply, params, support.features, start, inner, steps, adapted, step_size, form)
        loop = Loop(plan, jax.tree.structure(start), loss, inner, steps, first_order, count, remat, precision)
        if chunk is None or chunk >= users:
            return loop.users(leaves, support)
        results = jax.lax.map(jax.checkpoint(lambda piece: loop.users(leaves, piece)), pieces(support, chunk))
        return joined(results, users)

    return automatic(run, params, step_size, count, support, like=support.mask)


def predict(apply: Apply, params: Params, adapted: Adapted, features: Features) -> jax.Array:
    """Score examples with each user's adapted model.

    Differentiable in `params` and `features`, and in `adapted` if no user failed.

    Args:
      apply, params: as given to `adapt`.
      adapted: the result of `adapt`.
      features: `[users, examples, ...]`.

    Returns:
      Scores `[users, examples]`.

    Raises:
      ValueError: `params` has another number of leaves than at `adapt`.

    Example:
      Two users, both with x = 1, start from w = 0. The first likes it (y = 2), the second does not (y = -2):

      >>> apply, w = lambda w, x: x @ w, jnp.zeros(1)
      >>> support = mr.Examples(jnp.ones((2, 1, 1)), jnp.array([[2.0], [-2.0]]), jnp.ones((2, 1)))
      >>> adapted = mr.core.adapt(apply, w, support)
      >>> mr.core.predict(apply, w, adapted, jnp.array([[[1.0], [2.0]]] * 2))
      Array([[ 0.4,  0.8],
             [-0.4, -0.8]], dtype=float32)
    """
    _matching(params, adapted)
    return automatic(partial(_predict, apply), params, adapted, features, like=adapted.failed)


def _predict(apply: Apply, params: Params, adapted: Adapted, features: Features) -> jax.Array:
    params = varying(params, features)
    leaves = jax.tree.leaves(params)
    numbers = [leaf for leaf, entry in enumerate(adapted.leaves) if entry is not None]
    program = _trace.model(apply, params, one_user(features), numbers)
    axes = {leaf: e.axes for leaf, e in enumerate(adapted.leaves) if isinstance(e, Factored)}
    sites = {
        at: site
        for at, site in _trace.roles(program, numbers).sites.items()
        if site.leaf in axes and axes[site.leaf] == site.axes
    }
    factored = {site.leaf for site in sites.values()}

    def scores(entries: tuple[Explicit | Factored | None, ...], failed: jax.Array, user: Features) -> jax.Array:
        values = [
            w if entry is None or leaf in factored else _value(w, entry, failed)
            for leaf, (w, entry) in enumerate(zip(leaves, entries, strict=True))
        ]
        env = {**program.consts, **dict(zip(program.inputs[0], values, strict=True))}
        env.update(zip(program.inputs[1], jax.tree.leaves(user), strict=True))
        replaced = with_precision(program, adapted.precision)
        for at, site in sites.items():
            product, entry = replaced.get(at, partial(_first, program.ops[at])), entries[site.leaf]
            assert isinstance(entry, Factored)  # `sites` holds factored leaves only
            replaced[at] = partial(_layer, site, product, entry, failed, adapted.precision)
        program.run(range(len(program.ops)), env, replaced)
        return program.result(env)

    return jax.vmap(scores)(adapted.leaves, adapted.failed, features)


def weights(params: Params, adapted: Adapted) -> Params:
    """Materialise each user's adapted leaves, for inspection and tests; `predict` does not form them.

    Args:
      params: the shared parameters given to `adapt`.
      adapted: the result of `adapt`.

    Returns:
      A pytree like `params`: `[users, ...]` where a leaf is adapted, None where it is shared. With one step or more it
      equals the result of `inner.adapt`.

    Raises:
      ValueError: `params` has another number of leaves than at `adapt`.

    Example:
      Only the bias adapts; the shared leaf is None:

      >>> params = {"b": jnp.zeros(()), "w": jnp.zeros(1)}
      >>> support = mr.Examples(jnp.ones((1, 1, 1)), jnp.array([[2.0]]), jnp.ones((1, 1)))
      >>> apply = lambda params, x: x @ params["w"] + params["b"]
      >>> mr.core.weights(params, mr.core.adapt(apply, params, support, adapted={"b": True, "w": False}))
      {'b': Array([0.4], dtype=float32), 'w': None}
    """
    full = [
        None if entry is None else jax.vmap(partial(_value, w))(entry, adapted.failed)
        for w, entry in zip(_matching(params, adapted), adapted.leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), full)


def mean_change(params: Params, adapted: Adapted, share: jax.Array) -> Params:
    """Compute the weighted sum of parameter changes over users, `sum_u share_u (w_u - params)`.

    This is Reptile's negative meta-gradient. No per-user weights are formed: the low-rank terms of all users are summed
    in one product.

    Args:
      params: the shared parameters given to `adapt`.
      adapted: the result of `adapt`.
      share: `[users]` weight of each user.

    Returns:
      A pytree like `params`, with zeros where a leaf is shared.

    Raises:
      ValueError: `params` has another number of leaves than at `adapt`, or `share` is not `[users]`.

    Example:
      One user moves w from 0 to 0.4, the other to -0.8; the plain mean of the changes is -0.2:

      >>> support = mr.Examples(jnp.ones((2, 1, 1)), jnp.array([[2.0], [-4.0]]), jnp.ones((2, 1)))
      >>> adapted = mr.core.adapt(lambda w, x: x @ w, jnp.zeros(1), support)
      >>> mr.core.mean_change(jnp.zeros(1), adapted, jnp.array([0.5, 0.5]))
      Array([-0.2], dtype=float32)
    """
    if share.shape != adapted.failed.shape:
        raise ValueError(f"share must be [{len(adapted.failed)}], one weight a user, got {share.shape}")

    def change(w: jax.Array, entry: Explicit | Factored | None) -> jax.Array:
        if entry is None:
            return jnp.zeros_like(w)
        if isinstance(entry, Explicit):
            return jnp.tensordot(share.astype(w.dtype), entry.value - w, axes=1)
        outputs = share.astype(w.dtype)[:, None, None] * entry.outputs
        inputs, outputs = (a.reshape(-1, *a.shape[2:]) for a in (entry.inputs, outputs))
        return _change(w, Factored(inputs, outputs, entry.axes))

    changes = map(change, _matching(params, adapted), settled(adapted).leaves)
    return jax.tree.unflatten(jax.tree.structure(params), changes)


def _matching(params: Params, adapted: Adapted) -> list[jax.Array]:
    """Return the leaves of `params`; raise if they are not as many as the entries of `adapted`."""
    leaves = jax.tree.leaves(params)
    if len(leaves) != len(adapted.leaves):
        raise ValueError(
            f"params have {len(leaves)} leaves, but adapt was given params with {len(adapted.leaves)}; pass the same"
        )
    return leaves


def _value(w: jax.Array, entry: Explicit | Factored, failed: jax.Array) -> jax.Array:
    """Return one user's values of a leaf."""
    return entry.value if isinstance(entry, Explicit) else jnp.where(failed, w, w + _change(w, entry))


def _change(w: jax.Array, entry: Factored) -> jax.Array:
    """Compute `inputs^T outputs` in the shape of the leaf; the entry has no users' axis."""
    if entry.axes is None:
        return (
            jnp.zeros_like(w).at[entry.inputs].add(entry.outputs.reshape(len(entry.outputs), *w.shape[1:]), mode="drop")
        )
    free = [a for a in range(w.ndim) if a not in entry.axes]
    order = [*entry.axes, *free]
    inverse = [order.index(a) for a in range(w.ndim)]
    return jnp.matmul(entry.inputs.T, entry.outputs).reshape([w.shape[a] for a in order]).transpose(inverse)


def _first(op: _trace.Op, *operands: jax.Array) -> jax.Array:
    return op(*operands)[0]


def _layer(
    site: Site, product: Any, entry: Factored, failed: jax.Array, precision: Any, *operands: jax.Array
) -> jax.Array:
    """Evaluate a layer of one user's adapted model: shared product plus correction, 0 for a failed user."""
    out, inputs = product(*operands), site.inputs(operands[1 - site.position])
    if jnp.issubdtype(inputs.dtype, jnp.inexact):  # a failed user's factors may be non-finite: no gradient through them
        inputs = jnp.where(failed, jax.lax.stop_gradient(inputs), inputs)
    gram = site.gram(inputs, entry.inputs, precision)
    correction = jnp.where(failed, 0, jnp.matmul(gram, entry.outputs, precision=precision))
    return out + site.unflat(correction, out.shape).astype(out.dtype)
