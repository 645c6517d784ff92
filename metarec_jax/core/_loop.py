"""The inner loop of the dual engine as a plan lays it out, and the isolation of users whose numbers fail."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.core._plan import DUAL, EXPLICIT, MERGED, Plan, step_factors
from metarec_jax.core._trace import Program
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, mean_loss

# Inner steps written out; more are a scan, but for DUAL leaves. On a CPU a scan compiles faster and runs as fast; a GPU
# copies what it keeps for the backward pass.
UNROLLED = 2
UNROLLED_ELSEWHERE = 8


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
      outputs: `[users, rank, out]` what they add to the layer's outputs, or to those rows. Both as they came out, not
        finite perhaps, where the user failed: see `settled`.
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


class Loop(NamedTuple):
    """The inner loop of a batch of users, laid out by a plan."""

    plan: Plan
    tree: Any  # structure of the adapted leaves
    loss: PointwiseLoss
    optimizer: optax.GradientTransformation
    steps: int
    first_order: bool
    absent: float | jax.Array  # the `count` of `adapt`
    remat: bool
    precision: Any

    def users(self, leaves: list[jax.Array], support: Examples) -> Adapted:
        """Adapts every user of a batch; one who fails is set back and cannot reach the others' gradients."""
        entries, fine = isolated(self.run, leaves, support)
        return Adapted(tuple(entries.get(i) for i in range(len(leaves))), ~fine, self.precision)

    def run(self, leaves: list[jax.Array], support: Examples) -> tuple[dict[int, Explicit | Factored], jax.Array]:
        """The adapted leaves, and `[users]` whether every number on the way was finite."""
        shared, still = self.prepare(leaves, support.features)
        return jax.vmap(partial(self.user, shared))(still, support.target, support.mask)

    def prepare(self, leaves: list[jax.Array], features: Features) -> tuple[dict[int, Any], dict[int, Any]]:
        """All that the inner steps do not change: the same for every user, and `[users, ...]`."""
        plan, program = self.plan, self.plan.program
        products = with_precision(program, self.precision)
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
        given = jax.lax.stop_gradient(env) if self.first_order else env  # FOMAML: inner gradients are constants
        present = jnp.any(mask > 0)
        values = {leaf: env[plan.program.inputs[0][leaf]] for leaf in plan.ranked(EXPLICIT)}
        bases = {leaf: self.inputs(leaf, given, {}) for leaf in plan.ranked(MERGED)}
        grams = {
            at: site.gram(site.inputs(env[site.operand]), bases[site.leaf], self.precision)
            for at, site in plan.sites.items()
            if plan.kinds[site.leaf] == MERGED and self.steps > 1
        }
        blocks: dict[int, list[tuple[jax.Array, jax.Array]]] = {leaf: [] for leaf in plan.ranked(DUAL)}
        coordinates = {leaf: self._zeros(leaf, env) for leaf in plan.ranked(DUAL, MERGED)}
        gradients = jax.checkpoint(self.gradients) if self.remat else self.gradients

        def step(carry: Any, k: Any) -> Any:
            values, coordinates, state, fine = carry
            first = isinstance(k, int) and k == 0
            factors = {} if first else {leaf: self._factors(leaf, bases, blocks, coordinates) for leaf in coordinates}
            gradient, taps, seen, value = gradients(env, target, mask, values, factors, grams)
            fine &= jnp.isfinite(value)
            moves = {}
            for leaf in coordinates:
                inputs = bases[leaf] if leaf in bases else self.inputs(leaf, given, seen)
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
        unrolled = UNROLLED if jax.default_backend() == "cpu" else UNROLLED_ELSEWHERE
        looped = self.steps > unrolled and not blocks
        for k in range(1 if looped else self.steps):  # the first step apart: its weights are still shared
            carry, _ = step(carry, k)
        if looped:
            carry, _ = jax.lax.scan(step, carry, jnp.arange(1, self.steps))
        values, coordinates, _, fine = carry
        entries: dict[int, Any] = {leaf: Explicit(value) for leaf, value in values.items()}
        for leaf in coordinates:
            axes = plan.sites[plan.sites_of(leaf)[0]].axes
            entries[leaf] = Factored(*self._factors(leaf, bases, blocks, coordinates), axes)
        return entries, fine & self._finite(entries, env)

    def _finite(self, entries: dict[int, Explicit | Factored], env: dict[int, Any]) -> jax.Array:
        """Whether every number of one user's entries is finite, read from as few numbers as tell.

        A fixed layer's inputs may be far wider than its outputs, in which any of them that is not finite shows, and so
        does a sum of finite ones that is too large.
        """
        plan, numbers = self.plan, []
        for leaf, entry in entries.items():
            if isinstance(entry, Explicit):
                # a barrier, so that a GPU does not fuse this reduction with those that make the values
                numbers.append(jax.lax.optimization_barrier(jax.lax.stop_gradient(entry.value)))
                continue
            numbers.append(entry.outputs)
            sites = {at: plan.sites[at] for at in plan.sites_of(leaf)}
            narrower = all(site.fixed and site.outputs < site.width for site in sites.values())
            if entry.axes is not None and narrower and self._step(leaf)[1] is None:
                numbers += [env[plan.program.ops[at].outputs[0]] for at in sites]
            else:
                numbers.append(entry.inputs)
        real = [a for a in numbers if jnp.issubdtype(a.dtype, jnp.inexact)]
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in real]))

    def gradients(
        self, env: dict[int, Any], target: Any, mask: Any, values: dict, factors: dict, grams: dict
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array], jax.Array]:
        """Gradients at the explicit leaves and at the sites' outputs, the sites' inputs, and the loss."""
        program, sites = self.plan.program, self.plan.sites

        def support_loss(values: dict, taps: dict) -> tuple[jax.Array, dict[int, jax.Array]]:
            local = {**env, **{program.inputs[0][leaf]: w for leaf, w in values.items()}}
            replaced = with_precision(program, self.precision)

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
                    correction = site.unflat(jnp.matmul(gram, outputs, precision=self.precision), out.shape)
                    out = out + correction.astype(out.dtype)
                return out + taps[at]

            products = {at: replaced[at] for at in sites if at in replaced}
            replaced.update({at: partial(layer, at) for at in sites})
            program.run(self.plan.moving, local, replaced)
            value = mean_loss(self.loss, program.result(local), Examples((), target, mask), self.absent)
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
        axes = (0,) if sites[0].axes is None else sites[0].axes
        free = [n for axis, n in enumerate(w.shape) if axis not in axes]
        return jnp.zeros((sum(site.rows for site in sites), *(1,) * (len(axes) - 1), *free), w.dtype)

    def inputs(self, leaf: int, env: dict[int, Any], seen: dict[int, Any]) -> jax.Array:
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
        found = step_factors(self.plan.step_sizes[leaf], shape, site.axes)
        assert found is not None  # _kind has seen to it
        return found

    def _factors(self, leaf: int, bases: dict, blocks: dict, coordinates: dict) -> tuple[jax.Array, jax.Array]:
        """`inputs`, `outputs` of a leaf's `Factored` form so far."""
        if leaf in bases:
            width = self.plan.sites[self.plan.sites_of(leaf)[0]].outputs
            return bases[leaf], coordinates[leaf].reshape(bases[leaf].shape[0], width)
        inputs, outputs = zip(*blocks[leaf], strict=True)
        coefficients = coordinates[leaf].reshape(self.steps)[: len(outputs)]
        weighed = [c * d for c, d in zip(coefficients, outputs, strict=True)]
        return (inputs[0], weighed[0]) if len(inputs) == 1 else (jnp.concatenate(inputs), jnp.concatenate(weighed))


def isolated(run: Callable[..., Any], leaves: list[jax.Array], support: Examples) -> tuple[Any, jax.Array]:
    """`run(leaves, support)`, with users that were not fine on shared values, where explicit, and without a gradient.

    Whoever reads a factored entry leaves those users out. Their cotangents are dropped here, and a zero cotangent is
    not enough: it turns NaN where it meets an infinite number. So where a user failed, the backward pass is taken anew
    with those users on a healthy user's numbers. Nothing is paid where none failed, except under `vmap` over parameters
    (an ensemble), where the branch becomes a selection and both are run.
    """
    pure, consts = jax.closure_convert(run, leaves, support)
    args, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, (leaves, support, consts)))
    real = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def outputs(reals: list[jax.Array], args: list[jax.Array], fine: jax.Array | None) -> Any:
        both = dict(enumerate(args)) | dict(zip(real, reals, strict=True))
        leaves, support, consts = jax.tree.unflatten(structure, [both[i] for i in range(len(args))])
        entries, now = pure(leaves, support if fine is None else healthy(support, fine), *consts)
        entries = shared_where_failed(entries, leaves, now) if fine is None else reset(entries, leaves, fine)
        flat, tree = jax.tree.flatten(entries)
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


def choose(fine: jax.Array, own: jax.Array, other: Any) -> jax.Array:
    """`[users, ...]`: a user's own array where fine `[users]`, else the other; in copies `[users, members]` too."""
    return jnp.where(fine.reshape(*fine.shape, *(1,) * (own.ndim - fine.ndim)), own, jnp.asarray(other, own.dtype))


def shared_where_failed(entries: dict[int, Any], leaves: list[jax.Array], fine: jax.Array) -> dict[int, Any]:
    """`entries` with the shared values of explicit leaves for the users that are not fine."""
    return {
        leaf: Explicit(choose(fine, entry.value, leaves[leaf])) if isinstance(entry, Explicit) else entry
        for leaf, entry in entries.items()
    }


def reset(entries: dict[int, Any], leaves: list[jax.Array], fine: jax.Array) -> dict[int, Any]:
    """`entries` with the shared parameters for the users that are not fine."""
    explicit = shared_where_failed(entries, leaves, fine)
    return {leaf: _zeros_where_failed(entry, fine) for leaf, entry in explicit.items()}


def settled(adapted: Adapted) -> Adapted:
    """`adapted` with factored terms of 0 for the users that failed, at the price of a copy."""
    return replace(adapted, leaves=tuple(_zeros_where_failed(entry, ~adapted.failed) for entry in adapted.leaves))


def _zeros_where_failed(entry: Any, fine: jax.Array) -> Any:
    return jax.tree.map(partial(choose, fine, other=0), entry) if isinstance(entry, Factored) else entry


def healthy(support: Examples, fine: jax.Array) -> Examples:
    """`support` with a healthy user's examples, masked, in the place of those of users that are not fine."""
    if not len(fine):
        return support
    user = jnp.where(fine, jnp.arange(len(fine)), jnp.argmax(fine))

    def swap(a: jax.Array) -> jax.Array:
        taken = jnp.asarray(a)[user]
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return taken
        return jnp.where(jnp.any(fine), taken, jnp.zeros((), a.dtype))  # zeros where all users failed

    return Examples(jax.tree.map(swap, support.features), swap(support.target), choose(fine, support.mask, 0))


def as_precision(precision: Any) -> Any:
    if precision is not None and not isinstance(precision, jax.lax.DotAlgorithmPreset | jax.lax.Precision | str):
        if jnp.dtype(precision) != jnp.bfloat16:
            raise ValueError(f"precision must be None, a jax.lax.Precision or jnp.bfloat16, got {precision!r}")
        return jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return precision


def with_precision(program: Program, precision: Any) -> dict[int, Callable[..., jax.Array]]:
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
