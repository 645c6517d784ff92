"""The dual engine: adapt every user's layers without ever forming a user's weights.

An SGD step adds `-lr X^T D` to a dense layer, X its inputs on the support and D the gradient at its outputs.
So `x W' = x W - lr (x X^T) D`: one large product that all users share, and a correction of low rank for each.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import _trace
from metarec_jax.core._loop import Adapted, Explicit, Factored, Loop, as_precision, settled, with_precision
from metarec_jax.core._plan import PlainFormWarning, costs, make_plan, one_user
from metarec_jax.core._trace import Site
from metarec_jax.core.inner import check_count, partition
from metarec_jax.core.outer import pieces
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
    """Each user's parameters after `steps` optimiser steps on the support loss; `inner.adapt`, faster.

        w_0 = params;  w_{k+1} = w_k + step_size * optimizer(grad L_support(w_k))

    The weights of dense layers and the rows of tables are found in the jaxpr of `apply` and kept factored.
    Exact in `params` and `step_size` to second order, in reverse mode. A user with no support example keeps
    the shared parameters; so does one whose inner loop meets a non-finite number, and it adds nothing to any
    gradient.

    Args:
      apply: `apply(params, features) -> scores`, for one user: features `[examples, ...]`, scores
        `[examples]`.
      params: shared parameters, a pytree.
      support: `[users, examples, ...]` what each user adapts to.
      loss: elementwise loss of scores and targets; its mean over a user's real examples is minimised.
      optimizer: any optax transformation (default `optax.sgd(0.1)`). Layers stay factored where its updates
        are a fixed combination of the gradients (SGD, momentum, schedules, also with a learning rate that is
        learned).
      steps: number of inner steps. With a layer whose input moves (dual), the program grows with their square.
      adapted: which leaves adapt: a pytree of Python bools, or a prefix of one (True: all of them).
      step_size: multiplies the updates; a scalar or array, or a pytree prefix of the adapted leaves. Layers
        stay factored with one per layer, per column `[out]` and per row `[in, 1]`; not with one per weight.
      first_order: drop the second-order terms of the meta-gradient (FOMAML).
      count: adds to the number of a user's examples in that mean, as so many more whose loss nothing changes: with few
        real ones a user moves less, as a posterior mean does, unless the optimiser's steps do not depend on the size of
        the gradient, as Adam's. 0 or more; 0 is the published mean.
      form: "auto" (see `costs`), "dual", "plain" (per-user values), or a pytree prefix of the adapted leaves.
      precision: of the matrix products that are not inside loops or branches of `apply`: a `jax.lax.Precision`, or
        `jnp.bfloat16` for bfloat16 with float32 sums.
      remat: recompute the inner steps in the backward pass instead of keeping their activations.
      chunk: users adapted at a time; see also `outer.chunked`.

    Returns:
      `Adapted`, with the users' axis first in every array.

    Raises:
      ValueError: for a negative number of steps or count, or an unknown form.

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
      Li et al., Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    check_count(count)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    leaves, precision = jax.tree.leaves(params), as_precision(precision)
    start = partition(params, adapted)
    if steps == 0 or not jax.tree.leaves(start):
        return Adapted((None,) * len(leaves), jnp.zeros(support.mask.shape[0], bool), precision)
    plan = make_plan(apply, params, support.features, start, optimizer, steps, adapted, step_size, form)
    loop = Loop(plan, jax.tree.structure(start), loss, optimizer, steps, first_order, count, remat, precision)
    if chunk is None or chunk >= support.mask.shape[0]:
        return loop.users(leaves, support)
    results = jax.lax.map(jax.checkpoint(lambda piece: loop.users(leaves, piece)), pieces(support, chunk))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[: support.mask.shape[0]], results)


def predict(apply: Apply, params: Params, adapted: Adapted, features: Features) -> jax.Array:
    """Scores `[users, examples]` of each user's adapted model on `features` `[users, examples, ...]`.

    Differentiable in `params`, `features` and `adapted`, in the last where no user failed.

    Raises:
      ValueError: `params` are not those that `adapted` came from.
    """
    leaves = _matching(params, adapted)
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
            assert isinstance(entry, Factored)  # `sites` has no other leaf
            replaced[at] = partial(_layer, site, product, entry, failed, adapted.precision)
        program.run(range(len(program.ops)), env, replaced)
        return program.result(env)

    return jax.vmap(scores)(adapted.leaves, adapted.failed, features)


def weights(params: Params, adapted: Adapted) -> Params:
    """Each user's adapted leaves written out, `[users, ...]`, None where shared.

    After a step or more this is what `inner.adapt` returns. For inspection and tests; `predict` never forms them.
    """
    full = [
        None if entry is None else jax.vmap(partial(_value, w))(entry, adapted.failed)
        for w, entry in zip(_matching(params, adapted), adapted.leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), full)


def mean_change(params: Params, adapted: Adapted, share: jax.Array) -> Params:
    """`sum_u share_u (w_u - params)` over users, a pytree like `params`; zeros where a leaf is shared.

    Reptile's meta-gradient, negated. No user's weights are formed: the users' low-rank terms are one product.

    Args:
      params: the shared parameters that `adapted` came from.
      adapted: of `adapt`.
      share: `[users]` weight of each user.

    Raises:
      ValueError: `params` are not those that `adapted` came from, or `share` has another number of users.
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
    """The leaves of `params`, one for each entry of `adapted`."""
    leaves = jax.tree.leaves(params)
    if len(leaves) != len(adapted.leaves):
        raise ValueError(
            f"params have {len(leaves)} leaves, those that users were adapted from had {len(adapted.leaves)}"
        )
    return leaves


def _value(w: jax.Array, entry: Explicit | Factored, failed: jax.Array) -> jax.Array:
    """One user's values of a leaf."""
    return entry.value if isinstance(entry, Explicit) else jnp.where(failed, w, w + _change(w, entry))


def _change(w: jax.Array, entry: Factored) -> jax.Array:
    """`inputs^T outputs`, in the shape of the leaf; the entry is without a users' axis."""
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
    """A layer of one user's adapted model: shared product plus correction, which a user who failed has not."""
    out, inputs = product(*operands), site.inputs(operands[1 - site.position])
    if jnp.issubdtype(inputs.dtype, jnp.inexact):  # the same value, but no gradient through what may not be finite
        inputs = jnp.where(failed, jax.lax.stop_gradient(inputs), inputs)
    gram = site.gram(inputs, entry.inputs, precision)
    correction = jnp.where(failed, 0, jnp.matmul(gram, entry.outputs, precision=precision))
    return out + site.unflat(correction, out.shape).astype(out.dtype)
