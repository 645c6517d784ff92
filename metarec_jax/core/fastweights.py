"""The dual engine: adapt every user's layers without ever forming a user's weights.

An SGD step adds `-lr X^T D` to a dense layer, X its inputs on the support and D the gradient at its outputs.
So `x W' = x W - lr (x X^T) D`: one large product that all users share, and a correction of low rank for each.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.core import _trace
from metarec_jax.core._trace import Program, Site
from metarec_jax.core.inner import partition
from metarec_jax.core.outer import Loss
from metarec_jax.tasks import Apply, Examples, Features, Params, PointwiseLoss, Task, mean_loss

EXPLICIT, DUAL, MERGED = "explicit", "dual", "merged"
UNROLLED = 8  # inner steps written out, which runs faster; beyond, a scan, which compiles faster


class PlainFormWarning(UserWarning):
    """A weight is held as per-user values because of how it is used: the same result at a higher price."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Explicit:
    """A leaf with values of its own for each user: `value` is `[users, *leaf shape]`."""

    value: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """A leaf that differs from the shared one by a term of low rank: `W_user = W + inputs^T outputs`.

    Attributes:
      inputs: `[users, rank, in]` inputs of the layer, or `[users, rank]` rows of a table that were looked up.
      outputs: `[users, rank, out]` what they add to the layer's outputs, or to those rows.
      axes: the leaf's axes that the layer contracts; None for a table.
    """

    inputs: jax.Array
    outputs: jax.Array
    axes: tuple[int, ...] | None = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """What `adapt` found for each user. Opaque: read it with `predict` or `weights`.

    Attributes:
      leaves: an entry for each leaf of the parameters, None where all users share it.
      failed: `[users]` bool: the inner loop met a non-finite number, and the user keeps the shared
        parameters.
      precision: of the matrix products.
    """

    leaves: tuple[Explicit | Factored | None, ...]
    failed: jax.Array
    precision: Any = field(metadata={"static": True})


class _Plan(NamedTuple):
    """How one call of `adapt` runs. Leaves are numbered as in `jax.tree.leaves(params)`, ops by position."""

    program: Program
    kinds: dict[int, str]  # adapted leaf -> EXPLICIT, DUAL or MERGED
    sites: dict[int, Site]  # op -> its use of a factored leaf
    step_sizes: dict[int, Any]
    shared: list[int]  # ops that depend on no user
    still: list[int]  # ops that depend on the user but on no adapted leaf: evaluated once
    moving: list[int]  # ops evaluated at every inner step
    carried: list[int]  # values that the moving ops read from the still ones

    def ranked(self, *kinds: str) -> list[int]:
        return [leaf for leaf, kind in self.kinds.items() if kind in kinds]

    def sites_of(self, leaf: int) -> list[int]:
        return [at for at, site in self.sites.items() if site.leaf == leaf]


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
      steps: number of inner steps.
      adapted: which leaves adapt: a pytree of Python bools, or a prefix of one (True: all of them).
      step_size: multiplies the updates; a scalar or array, or a pytree prefix of the adapted leaves. Layers
        stay factored with one per layer, per column `[out]` and per row `[in, 1]`; not with one per weight.
      first_order: drop the second-order terms of the meta-gradient (FOMAML).
      form: "auto" (see `costs`), "dual", "plain" (per-user values), or a pytree prefix of the adapted leaves.
      precision: of the matrix products: a `jax.lax.Precision`, or `jnp.bfloat16` for bfloat16 with float32
        sums.
      remat: recompute the inner steps in the backward pass instead of keeping their activations.
      chunk: users adapted at a time; see also `chunked`.

    Returns:
      `Adapted`, with the users' axis first in every array.

    Raises:
      ValueError: for a negative number of steps or an unknown form.

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
      Li et al., Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    leaves, precision = jax.tree.leaves(params), _precision(precision)
    if steps == 0:
        return Adapted((None,) * len(leaves), jnp.zeros(support.mask.shape[0], bool), precision)
    start = partition(params, adapted)
    plan = _plan(apply, params, support, start, optimizer, steps, adapted, step_size, form)
    loop = _Loop(plan, jax.tree.structure(start), loss, optimizer, steps, first_order, remat, precision)
    if chunk is None or chunk >= support.mask.shape[0]:
        return loop.users(leaves, support)
    pieces = _pieces(support, chunk)
    results = jax.lax.map(jax.checkpoint(lambda piece: loop.users(leaves, piece)), pieces)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[: support.mask.shape[0]], results)


def predict(apply: Apply, params: Params, adapted: Adapted, features: Features) -> jax.Array:
    """Scores `[users, examples]` of each user's adapted model on `features` `[users, examples, ...]`.

    Differentiable in `params`, `adapted` and `features`.
    """
    numbers = [leaf for leaf, entry in enumerate(adapted.leaves) if entry is not None]
    program = _trace.model(apply, params, _one_user(features), numbers)
    axes = {leaf: e.axes for leaf, e in enumerate(adapted.leaves) if isinstance(e, Factored)}
    sites = {
        at: site
        for at, site in _trace.roles(program, numbers).sites.items()
        if site.leaf in axes and axes[site.leaf] == site.axes
    }
    factored = {site.leaf for site in sites.values()}
    leaves = jax.tree.leaves(params)

    def scores(entries: tuple[Explicit | Factored | None, ...], user: Features) -> jax.Array:
        values = [
            w if entry is None or leaf in factored else _value(w, entry)
            for leaf, (w, entry) in enumerate(zip(leaves, entries, strict=True))
        ]
        env = {**program.consts, **dict(zip(program.inputs[0], values, strict=True))}
        env.update(zip(program.inputs[1], jax.tree.leaves(user), strict=True))
        replaced = _with_precision(program, adapted.precision)
        for at, site in sites.items():
            replaced[at] = partial(_layer, program, at, site, replaced.get(at), entries[site.leaf], adapted.precision)
        program.run(range(len(program.ops)), env, replaced)
        return program.result(env)

    return jax.vmap(scores)(adapted.leaves, features)


def weights(params: Params, adapted: Adapted) -> Params:
    """Each user's adapted leaves written out, `[users, ...]`, None where shared: what `inner.adapt` returns.

    For inspection and tests; `predict` never forms them.
    """
    leaves, structure = jax.tree.flatten(params)
    full = [
        None if entry is None else jax.vmap(partial(_value, w))(entry)
        for w, entry in zip(leaves, adapted.leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, full)


def chunked(loss: Loss, chunk: int) -> Loss:
    """A meta-loss that works through its users `chunk` at a time: same value, same gradient, bounded memory.

    Value and gradient of a chunk are found together, so nothing is computed twice and no activation outlives
    its chunk; small chunks also stay in a CPU's cache. Users without a query example do not count, as in
    `outer.query_loss`. Differentiable once, in `params` only.

    Args:
      loss: `loss(params, task, key) -> (scalar, aux)`, a mean over the task's users that have a query
        example.
      chunk: users at a time; the last chunk is filled up with users that have no examples.

    Returns:
      A loss of the same form, each chunk with its own key. In `aux`, scalar floats are averaged as the loss
      is, scalar counts (integers and bools) are summed, and arrays `[users, ...]` are joined.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")

    def whole(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        users = task.query.mask.shape[0]
        if users <= chunk:
            return loss(params, task, key)
        pieces = _pieces(task, chunk)
        counts = jnp.any(pieces.query.mask > 0, axis=-1).sum(-1)
        share = counts / jnp.maximum(counts.sum(), 1)
        inputs = (pieces, None if key is None else jax.random.split(key, len(counts)), share)

        def total(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            def piece(value: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
                task, key, share = inputs
                part, aux = loss(params, task, key)
                return value + _weigh(share, part), aux

            value, aux = jax.lax.scan(piece, jnp.zeros(()), inputs)
            return value, jax.tree.map(partial(_join, share, users), aux)

        def forward(params: Params) -> tuple[Any, Params]:
            def piece(sums: Any, inputs: Any) -> tuple[Any, Any]:
                task, key, share = inputs
                (part, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, task, key)
                return jax.tree.map(lambda sum, new: sum + _weigh(share, new), sums, (part, gradient)), aux

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            (value, gradient), aux = jax.lax.scan(piece, zero, inputs)
            return (value, jax.tree.map(partial(_join, share, users), aux)), gradient

        rule = jax.custom_vjp(total)
        rule.defvjp(forward, lambda gradient, bar: (jax.tree.map(lambda g: (bar[0] * g).astype(g.dtype), gradient),))
        return rule(params)

    return whole


def _weigh(share: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(share > 0, share * value, 0).astype(value.dtype)


def _join(share: jax.Array, users: int, value: jax.Array) -> jax.Array:
    """The chunks' auxiliary outputs `[chunks, ...]` as one."""
    if value.ndim > 1:
        return value.reshape(-1, *value.shape[2:])[:users]
    return jnp.where(share > 0, share * value, 0).sum() if jnp.issubdtype(value.dtype, jnp.inexact) else value.sum()


def _pieces(batch: Any, chunk: int) -> Any:
    """`[users, ...]` as `[chunks, chunk, ...]`; the last chunk is filled with masked copies of a user."""
    users = jax.tree.leaves(batch)[0].shape[0]
    missing = -users % chunk

    def cut(a: jax.Array, fill: Callable[[jax.Array], jax.Array] = lambda last: last) -> jax.Array:
        full = a if not missing else jnp.concatenate([a, jnp.repeat(fill(a[-1:]), missing, axis=0)])
        return full.reshape(-1, chunk, *a.shape[1:])

    def examples(part: Examples) -> Examples:
        return Examples(jax.tree.map(cut, part.features), cut(part.target), cut(part.mask, jnp.zeros_like))

    return Task(*map(examples, batch)) if isinstance(batch, Task) else examples(batch)


def costs(rows: int, width: int, outputs: int, steps: int, merged: bool) -> tuple[float, float]:
    """What a layer costs a user over the inner loop and the query: (factored, per-user weights), relative.

    Counts products: forward, gradient at the weights, gradient at the inputs (not for a merged layer).
    Shared ones count once; each user's own run as many small products, at a third of the speed with whole
    weights and a fifth with corrections. The number of users scales both sides alike, so it does not enter.

    Args:
      rows: examples (times tokens) that the layer reads; the query is taken to have half as many.
      width, outputs: inputs and outputs of the layer.
      steps: inner steps K.
      merged: the layer's input is the same at every step.

    Checked on two CPU cores, 10 query examples: time of a whole meta-gradient with a hidden layer plain over
    the time with it dual.

        rows  in x out    K=1   K=2   K=3   K=5
           8   64 x 64   1.26  1.27  1.11  0.98
           8  256 x 128  4.03  3.45  3.23  2.55
          20   64 x 64   1.36  0.97  0.83  0.63
          20  256 x 128  2.74  2.30  2.18  1.41
          50   64 x 64   1.28  0.73  0.61  0.39
          50  256 x 128  1.97  1.30  0.92  0.82
    """
    whole, query = rows * width * outputs, rows / 2
    asked, side = query * width * outputs, width + outputs
    if merged:
        explicit = whole + 3 * ((2 * steps - 1) * whole + asked)
        kept = (rows * rows * width if steps > 1 else 0) + (steps - 1) * rows * rows * outputs
        return whole + asked + 5 * (kept + query * rows * side), explicit
    explicit = 2 * whole + 3 * ((3 * steps - 2) * whole + asked)
    correction = steps * (steps - 1) * rows * rows * side + query * steps * rows * side
    return 2 * steps * whole + asked + 5 * correction, explicit


def _plan(
    apply: Apply,
    params: Params,
    support: Examples,
    start: Params,
    optimizer: optax.GradientTransformation,
    steps: int,
    adapted: Params,
    step_size: Params,
    form: Params,
    kept: tuple[str, ...] = (DUAL, MERGED),
) -> _Plan:
    """The plan of one call of `adapt`; layers whose form is not `kept` get per-user weights."""
    flags = jax.tree.leaves(jax.tree.map(lambda m, sub: jax.tree.map(lambda _: bool(m), sub), adapted, params))
    numbers = [leaf for leaf, flag in enumerate(flags) if flag]
    program = _trace.model(apply, params, _one_user(support.features), numbers)
    roles = _trace.roles(program, numbers)
    sizes = dict(zip(numbers, _spread(step_size, start), strict=True))
    forms = dict(zip(numbers, _spread(form, start), strict=True))
    kinds, reasons = {}, {}
    for leaf, linear in zip(numbers, _trace.linearity(optimizer, start, min(steps, 4)), strict=True):
        kinds[leaf], reason = _kind(leaf, roles, linear, sizes[leaf], forms[leaf], jax.tree.leaves(params)[leaf], steps)
        kinds[leaf] = kinds[leaf] if kinds[leaf] in kept else EXPLICIT
        if reason and jnp.ndim(jax.tree.leaves(params)[leaf]) > 1:
            reasons[leaf] = reason
    if reasons:
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        told = "; ".join(f"{paths[leaf]}: {reason}" for leaf, reason in reasons.items())
        name = getattr(apply, "__qualname__", type(apply).__name__)
        warnings.warn(
            f"{name}: per-user weights are formed for some leaves; same result, more memory. {told}.",
            PlainFormWarning,
            stacklevel=3,
        )
    sites = {at: site for at, site in roles.sites.items() if kinds[site.leaf] != EXPLICIT}
    return _schedule(program, kinds, sites, sizes, numbers)


def _kind(
    leaf: int, roles: _trace.Roles, linear: _trace.Linearity, size: Any, form: str, w: jax.Array, steps: int
) -> tuple[str, str | None]:
    """The form of one adapted leaf, and the reason if that is not a free choice."""
    if form not in ("auto", "dual", "plain"):
        raise ValueError(f'form must be "auto", "dual" or "plain", got {form!r}')
    if form == "plain":
        return EXPLICIT, None
    uses = [site for site in roles.sites.values() if site.leaf == leaf]
    if not uses:
        return EXPLICIT, roles.reasons[leaf]
    if not (linear.own and linear.linear):
        return EXPLICIT, "the optimizer is not linear in its gradient"
    if _step_factors(size, jnp.shape(w), uses[0].axes) is None:
        return EXPLICIT, f"its step size has shape {jnp.shape(size)}, one per weight"
    merged = all(site.fixed for site in uses)
    if form == "auto":
        if uses[0].axes is None:
            factored, explicit = float(sum(site.rows for site in uses)), float(uses[0].width)
        else:
            rows = sum(site.rows for site in uses)
            factored, explicit = costs(rows, uses[0].width, uses[0].outputs, steps, merged)
        if explicit < factored:
            return EXPLICIT, None
    return (MERGED if merged else DUAL), None


def _schedule(program: Program, kinds: dict[int, str], sites: dict[int, Site], sizes: Any, numbers: Any) -> _Plan:
    """Sorts the ops by what they depend on, so that nothing is evaluated more often than it changes."""
    user = program.dependents(program.inputs[1])
    moving = program.dependents([program.inputs[0][leaf] for leaf in numbers])
    plan = _Plan(program, kinds, sites, sizes, [], [], [], [])
    read = {atom for atom in program.outputs if isinstance(atom, int)}
    for at, op in enumerate(program.ops):
        fixed = at in sites and sites[at].fixed
        if fixed or op.outputs[0] not in moving:
            depends = sites[at].operand in user if fixed else op.outputs[0] in user
            (plan.still if depends else plan.shared).append(at)
        if op.outputs[0] in moving:
            plan.moving.append(at)
            read.update(atom for atom in op.inputs if isinstance(atom, int))
            read.update(op.outputs if fixed else ())
    moved = {n for at in plan.moving for n in program.ops[at].outputs}
    bases = {n for at, site in sites.items() if site.fixed and site.operand in user for n in program.ops[at].outputs}
    plan.carried.extend(sorted(n for n in read if n in bases or (n in user and n not in moved)))
    return plan


class _Loop(NamedTuple):
    """The inner loop of a batch of users, laid out by a plan."""

    plan: _Plan
    tree: Any  # structure of the adapted leaves
    loss: PointwiseLoss
    optimizer: optax.GradientTransformation
    steps: int
    first_order: bool
    remat: bool
    precision: Any

    def users(self, leaves: list[jax.Array], support: Examples) -> Adapted:
        """Adapts every user of a batch; one who fails is set back and cannot reach the others' gradients."""
        entries, fine = _isolated(self.run, leaves, support)
        return Adapted(tuple(entries.get(i) for i in range(len(leaves))), ~fine, self.precision)

    def run(self, leaves: list[jax.Array], support: Examples) -> tuple[dict[int, Explicit | Factored], jax.Array]:
        """The adapted leaves, and `[users]` whether every number on the way was finite."""
        shared, still = self.prepare(leaves, support.features)
        return jax.vmap(partial(self.user, shared))(still, support.target, support.mask)

    def prepare(self, leaves: list[jax.Array], features: Features) -> tuple[dict[int, Any], dict[int, Any]]:
        """All that the inner steps do not change: the same for every user, and `[users, ...]`."""
        plan, program = self.plan, self.plan.program
        products = _with_precision(program, self.precision)
        shared = {**program.consts, **dict(zip(program.inputs[0], leaves, strict=True))}
        program.run(plan.shared, shared, products)

        def once(user: Features) -> dict[int, jax.Array]:
            env = {**shared, **dict(zip(program.inputs[1], jax.tree.leaves(user), strict=True))}
            program.run(plan.still, env, products)
            return {n: env[n] for n in plan.carried}

        return shared, jax.vmap(once)(features)

    def user(
        self, shared: dict[int, Any], still: dict[int, Any], target: jax.Array, mask: jax.Array
    ) -> tuple[dict[int, Explicit | Factored], jax.Array]:
        """One user's inner loop: the adapted leaves, and whether every number was finite."""
        plan, env = self.plan, {**shared, **still}
        present = jnp.any(mask > 0)
        values = {leaf: env[plan.program.inputs[0][leaf]] for leaf in plan.ranked(EXPLICIT)}
        bases = {leaf: self._inputs(leaf, env, {}) for leaf in plan.ranked(MERGED)}
        grams = {
            at: site.gram(site.inputs(env[site.operand]), bases[site.leaf], self.precision)
            for at, site in plan.sites.items()
            if plan.kinds[site.leaf] == MERGED and self.steps > 1
        }
        blocks: dict[int, list[tuple[jax.Array, jax.Array]]] = {leaf: [] for leaf in plan.ranked(DUAL)}
        coordinates = {leaf: self._zeros(leaf, env) for leaf in plan.ranked(DUAL, MERGED)}
        gradients = jax.checkpoint(self._gradients) if self.remat else self._gradients

        def step(carry: Any, k: Any) -> Any:
            values, coordinates, state, fine = carry
            first = isinstance(k, int) and k == 0
            factors = {} if first else {leaf: self._factors(leaf, bases, blocks, coordinates) for leaf in coordinates}
            gradient, taps, seen, value = gradients(env, target, mask, values, factors, grams)
            fine &= jnp.isfinite(value)
            moves = {}
            for leaf in coordinates:
                inputs = bases[leaf] if leaf in bases else self._inputs(leaf, env, seen)
                outputs = self._outputs(leaf, taps, inputs)
                if leaf in blocks:
                    blocks[leaf].append((inputs, outputs))
                    outputs = jnp.zeros_like(coordinates[leaf]).at[k].set(1.0)
                moves[leaf] = outputs.reshape(coordinates[leaf].shape)
            updates, state = self.optimizer.update(self._tree(gradient, moves), state, self._tree(values, coordinates))
            update = dict(zip(plan.kinds, jax.tree.leaves(updates), strict=True))
            coordinates = {leaf: c + update[leaf] for leaf, c in coordinates.items()}
            values = {
                leaf: w + jnp.where(present, plan.step_sizes[leaf] * update[leaf], 0).astype(w.dtype)
                for leaf, w in values.items()
            }
            return (values, coordinates, state, fine), None

        carry = (values, coordinates, self.optimizer.init(self._tree(values, coordinates)), jnp.array(True))
        looped = self.steps > UNROLLED and not blocks
        for k in range(1 if looped else self.steps):  # the first step apart: its weights are still shared
            carry, _ = step(carry, k)
        if looped:
            carry, _ = jax.lax.scan(step, carry, jnp.arange(1, self.steps))
        values, coordinates, _, fine = carry
        entries: dict[int, Any] = {leaf: Explicit(value) for leaf, value in values.items()}
        for leaf in coordinates:
            axes = plan.sites[plan.sites_of(leaf)[0]].axes
            entries[leaf] = Factored(*self._factors(leaf, bases, blocks, coordinates), axes)
        numbers = [a for a in jax.tree.leaves(entries) if jnp.issubdtype(a.dtype, jnp.inexact)]
        return entries, fine & jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in numbers]))

    def _gradients(
        self, env: dict[int, Any], target: Any, mask: Any, values: dict, factors: dict, grams: dict
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array], jax.Array]:
        """Gradients at the explicit leaves and at the sites' outputs, the sites' inputs, and the loss."""
        program, sites = self.plan.program, self.plan.sites

        def support_loss(values: dict, taps: dict) -> tuple[jax.Array, dict[int, jax.Array]]:
            local = {**env, **{program.inputs[0][leaf]: w for leaf, w in values.items()}}
            replaced = _with_precision(program, self.precision)

            def layer(at: int, *operands: jax.Array) -> jax.Array:
                site, op = sites[at], program.ops[at]
                if site.fixed:
                    out = env[op.outputs[0]]
                else:
                    out = products[at](*operands) if at in products else op(*operands)[0]
                if site.leaf in factors:
                    inputs, outputs = factors[site.leaf]
                    gram = grams.get(at)
                    if gram is None:
                        gram = site.gram(site.inputs(operands[1 - site.position]), inputs, self.precision)
                    out = out + site.unflat(jnp.matmul(gram, outputs, precision=self.precision), out.shape)
                return out + taps[at]

            products = {at: replaced[at] for at in sites if at in replaced}
            replaced.update({at: partial(layer, at) for at in sites})
            program.run(self.plan.moving, local, replaced)
            value = mean_loss(self.loss, program.result(local), Examples((), target, mask))
            return value, {site.operand: local[site.operand] for site in sites.values() if not site.fixed}

        outputs = {at: program.shapes[program.ops[at].outputs[0]] for at in sites}
        zeros = {at: jnp.zeros(a.shape, a.dtype) for at, a in outputs.items()}
        (value, seen), (gradient, taps) = jax.value_and_grad(support_loss, (0, 1), has_aux=True)(values, zeros)
        if self.first_order:
            gradient, taps, seen = jax.lax.stop_gradient((gradient, taps, seen))
        return gradient, taps, seen, value

    def _tree(self, values: dict[int, Any], coordinates: dict[int, Any]) -> Params:
        both = {**values, **coordinates}
        return jax.tree.unflatten(self.tree, [both[leaf] for leaf in self.plan.kinds])

    def _zeros(self, leaf: int, env: dict[int, Any]) -> jax.Array:
        """A leaf's coordinates before the first step, with as many axes as the leaf has.

        The optimiser works on coordinates as it would on the leaf, being linear. MERGED: the outputs
        `[rows, out]` that the one basis X multiplies; DUAL: `[steps]` coefficients of the steps' gradients.
        """
        w = env[self.plan.program.inputs[0][leaf]]
        sites = [self.plan.sites[at] for at in self.plan.sites_of(leaf)]
        if self.plan.kinds[leaf] == DUAL:
            return jnp.zeros((self.steps,) + (1,) * (w.ndim - 1), w.dtype)
        axes = sites[0].axes or (0,)
        free = [n for axis, n in enumerate(w.shape) if axis not in axes]
        return jnp.zeros((sum(site.rows for site in sites), *(1,) * (len(axes) - 1), *free), w.dtype)

    def _inputs(self, leaf: int, env: dict[int, Any], seen: dict[int, Any]) -> jax.Array:
        """Inputs of the layer at all its sites, `[rows, in]`, times the step size if that is per row."""
        sites, both = [self.plan.sites[at] for at in self.plan.sites_of(leaf)], {**env, **seen}
        rows = [site.inputs(both[site.operand]) for site in sites]
        inputs = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
        _, scale = self._step(leaf)
        return inputs if scale is None or sites[0].axes is None else inputs * scale

    def _outputs(self, leaf: int, taps: dict[int, Any], inputs: jax.Array) -> jax.Array:
        """Gradients at the layer's outputs at all its sites, `[rows, out]`, times the step size."""
        sites = {at: self.plan.sites[at] for at in self.plan.sites_of(leaf)}
        flat = [site.flat(taps[at]) for at, site in sites.items()]
        outputs = flat[0] if len(flat) == 1 else jnp.concatenate(flat)
        columns, rows = self._step(leaf)
        if columns is not None:
            return outputs * columns
        if rows is not None and next(iter(sites.values())).axes is None:
            return outputs * rows[inputs][:, None]
        return outputs

    def _step(self, leaf: int) -> tuple[Any, Any]:
        site = self.plan.sites[self.plan.sites_of(leaf)[0]]
        shape = self.plan.program.shapes[self.plan.program.inputs[0][leaf]].shape
        found = _step_factors(self.plan.step_sizes[leaf], shape, site.axes)
        assert found is not None  # _kind has seen to it
        return found

    def _factors(self, leaf: int, bases: dict, blocks: dict, coordinates: dict) -> tuple[jax.Array, jax.Array]:
        """`inputs`, `outputs` of a leaf's `Factored` form so far."""
        if leaf in bases:
            return bases[leaf], coordinates[leaf].reshape(bases[leaf].shape[0], -1)
        inputs, outputs = zip(*blocks[leaf], strict=True)
        weighed = [c * d for c, d in zip(coordinates[leaf].reshape(-1), outputs, strict=False)]
        return (inputs[0], weighed[0]) if len(inputs) == 1 else (jnp.concatenate(inputs), jnp.concatenate(weighed))


def _isolated(run: Callable[..., Any], leaves: list[jax.Array], support: Examples) -> tuple[Any, jax.Array]:
    """`run(leaves, support)` with the users that were not fine set to 0, in value and in gradient.

    A zero cotangent is not enough: it turns NaN where it meets an infinite number. So where a user failed,
      the
    backward pass is taken anew with those users on a healthy user's numbers; nothing is paid where none
    failed.
    """
    pure, consts = jax.closure_convert(run, leaves, support)
    args, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, (leaves, support, consts)))
    real = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def outputs(reals: list[jax.Array], args: list[jax.Array], fine: jax.Array | None) -> Any:
        both = dict(enumerate(args)) | dict(zip(real, reals, strict=True))
        leaves, support, consts = jax.tree.unflatten(structure, [both[i] for i in range(len(args))])
        entries, now = pure(leaves, support if fine is None else _healthy(support, fine), *consts)
        flat, tree = jax.tree.flatten(_reset(entries, leaves, now if fine is None else fine))
        return {i: a for i, a in enumerate(flat) if jnp.issubdtype(a.dtype, jnp.inexact)}, (flat, tree, now)

    def primal(*args: jax.Array) -> Any:
        _, (flat, tree, fine) = outputs([args[i] for i in real], list(args), None)
        return jax.tree.unflatten(tree, flat), fine

    def forward(*args: jax.Array) -> Any:
        reals = [args[i] for i in real]
        _, back, (flat, tree, fine) = jax.vjp(lambda r: outputs(r, list(args), None), reals, has_aux=True)
        return (jax.tree.unflatten(tree, flat), fine), (back, args, fine)

    def backward(kept: Any, bar: Any) -> tuple[Any, ...]:
        back, args, fine = kept
        bars = {i: a for i, a in enumerate(jax.tree.leaves(bar[0])) if a.dtype != jax.dtypes.float0}

        def again() -> Any:
            _, anew, _ = jax.vjp(lambda r: outputs(r, list(args), fine), [args[i] for i in real], has_aux=True)
            return anew(bars)

        (found,) = jax.lax.cond(jnp.all(fine), lambda: back(bars), again)
        cotangents = dict(zip(real, found, strict=True))
        return tuple(cotangents.get(i, np.zeros(a.shape, jax.dtypes.float0)) for i, a in enumerate(args))

    rule = jax.custom_vjp(primal)
    rule.defvjp(forward, backward)
    return rule(*args)


def _choose(fine: jax.Array, own: jax.Array, other: Any) -> jax.Array:
    """`[users, ...]`: a user's own array where fine, else the other."""
    return jnp.where(fine.reshape(-1, *(1,) * (own.ndim - 1)), own, other)


def _reset(entries: dict[int, Any], leaves: list[jax.Array], fine: jax.Array) -> dict[int, Any]:
    """`entries` with the shared parameters for the users that are not fine."""
    return {
        leaf: jax.tree.map(partial(_choose, fine, other=leaves[leaf] if isinstance(entry, Explicit) else 0), entry)
        for leaf, entry in entries.items()
    }


def _healthy(support: Examples, fine: jax.Array) -> Examples:
    """`support` with a healthy user's examples, masked, in the place of those of users that are not fine."""

    def swap(a: jax.Array) -> jax.Array:
        return _choose(fine, a, jax.lax.stop_gradient(jnp.where(jnp.any(fine), a[jnp.argmax(fine)], 0)))

    return Examples(jax.tree.map(swap, support.features), swap(support.target), _choose(fine, support.mask, 0))


def _step_factors(size: Any, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[Any, Any] | None:
    """A step size as (per column `[out]`, per row `[in]`), either None; None if it is neither."""
    if isinstance(size, int | float) and size == 1:
        return None, None
    given = (1,) * (len(shape) - jnp.ndim(size)) + jnp.shape(size)
    if len(given) > len(shape):
        return None
    axes = (0,) if axes is None else axes
    free = tuple(a for a in range(len(shape)) if a not in axes)
    if all(given[a] == 1 for a in axes):
        wide = jnp.broadcast_to(jnp.reshape(size, [given[a] for a in free]), [shape[a] for a in free])
        return wide.reshape(-1), None
    if all(given[a] == 1 for a in free):
        return None, jnp.broadcast_to(jnp.reshape(size, [given[a] for a in axes]), [shape[a] for a in axes]).reshape(-1)
    return None


def _value(w: jax.Array, entry: Explicit | Factored) -> jax.Array:
    """One user's values of a leaf."""
    if isinstance(entry, Explicit):
        return entry.value
    if entry.axes is None:
        return w.at[entry.inputs].add(entry.outputs.reshape(-1, *w.shape[1:]), mode="drop")
    change = jnp.matmul(entry.inputs.T, entry.outputs)
    free = [a for a in range(w.ndim) if a not in entry.axes]
    order = [*entry.axes, *free]
    inverse = [order.index(a) for a in range(w.ndim)]
    return w + change.reshape([w.shape[a] for a in order]).transpose(inverse)


def _layer(program: Program, at: int, site: Site, product: Any, entry: Any, precision: Any, *operands: Any) -> Any:
    """A layer of one user's adapted model: shared product plus correction."""
    out = program.ops[at](*operands)[0] if product is None else product(*operands)
    gram = site.gram(site.inputs(operands[1 - site.position]), entry.inputs, precision)
    return out + site.unflat(jnp.matmul(gram, entry.outputs, precision=precision), out.shape)


def _precision(precision: Any) -> Any:
    if precision is not None and not isinstance(precision, jax.lax.DotAlgorithmPreset | jax.lax.Precision | str):
        if jnp.dtype(precision) != jnp.bfloat16:
            raise ValueError(f"precision must be None, a jax.lax.Precision or jnp.bfloat16, got {precision!r}")
        return jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return precision


def _with_precision(program: Program, precision: Any) -> dict[int, Callable[..., jax.Array]]:
    """Replacements for the program's matrix products that run at the asked precision."""

    def product(params: dict[str, Any], lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.dot_general(lhs, rhs, params["dimension_numbers"], precision, params["preferred_element_type"])

    return (
        {}
        if precision is None
        else {
            at: partial(product, op.eqn.params)
            for at, op in enumerate(program.ops)
            if op.eqn.primitive.name == "dot_general"
        }
    )


def _one_user(features: Features) -> Features:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), features)


def _spread(prefix: Params, start: Params) -> list[Any]:
    """`prefix` repeated for each leaf of `start`."""
    spread = jax.tree.map(
        lambda value, sub: None if sub is None else [value] * len(jax.tree.leaves(sub)),
        prefix,
        start,
        is_leaf=lambda node: node is None,
    )
    return jax.tree.leaves(spread)
