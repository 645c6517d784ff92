"""Run a planned inner loop, and isolate users whose numbers become non-finite."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.core._plan import DUAL, EXPLICIT, MERGED, Plan, step_factors
from metarec_jax.core._spmd import varying
from metarec_jax.core._trace import Program
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, mean_loss

# Up to this many inner steps are unrolled; more run in a scan, unless there are DUAL leaves. On a CPU a scan compiles
# faster and runs as fast. On a GPU it copies the residuals of the backward pass.
UNROLLED = 2
UNROLLED_ELSEWHERE = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Explicit:
    """A leaf with explicit per-user values: `value` is `[users, *leaf shape]`."""

    value: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """A leaf with a low-rank per-user correction: `W_user = W + inputs^T outputs`.

    Both factors may be non-finite for failed users: callers must mask these, or use `settled`.

    Attributes:
      inputs: `[users, rank, in]` inputs of the layer, or `[users, rank]` row numbers of a table.
      outputs: `[users, rank, out]` changes for these inputs, or for these rows.
      axes: the leaf's axes that the layer contracts; None for a table.
    """

    inputs: jax.Array
    outputs: jax.Array
    axes: tuple[int, ...] | None = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """Adapted parameters of a batch of users. Opaque: read it with `predict` or `weights`.

    Attributes:
      leaves: an entry for each leaf of the parameters, None where all users share it.
      failed: `[users]` bool: the inner loop met a non-finite number, so the user keeps the shared parameters.
      precision: of the matrix products.
    """

    leaves: tuple[Explicit | Factored | None, ...]
    failed: jax.Array
    precision: Any = field(metadata={"static": True})


class Loop(NamedTuple):
    """The inner loop of a batch of users, run by a plan."""

    plan: Plan
    tree: Any  # tree structure of the adapted leaves
    loss: PointwiseLoss
    optimizer: optax.GradientTransformation
    steps: int
    first_order: bool
    absent: float | jax.Array  # the `count` of `adapt`
    remat: bool
    precision: Any

    def users(self, leaves: list[jax.Array], support: Examples) -> Adapted:
        """Adapt every user of a batch; a failed user is reset and does not affect the gradients of others."""
        entries, finite = isolated(self.run, leaves, support)
        return Adapted(tuple(entries.get(i) for i in range(len(leaves))), ~finite, self.precision)

    def run(self, leaves: list[jax.Array], support: Examples) -> tuple[dict[int, Explicit | Factored], jax.Array]:
        """Return the adapted leaves, and `[users]` whether every number in the loop was finite."""
        shared, still = self.prepare(leaves, support.features)
        return jax.vmap(partial(self.user, shared))(still, support.target, support.mask)

    def prepare(self, leaves: list[jax.Array], features: Features) -> tuple[dict[int, Any], dict[int, Any]]:
        """Evaluate all values that the inner steps do not change: shared ones, and per-user ones `[users, ...]`."""
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
        """Run one user's inner loop; return the adapted leaves and whether every number was finite."""
        plan, env = self.plan, {**shared, **still}
        input_env = jax.lax.stop_gradient(env) if self.first_order else env  # FOMAML: inner gradients are constants
        present = jnp.any(mask > 0)
        values = {leaf: env[plan.program.inputs[0][leaf]] for leaf in plan.ranked(EXPLICIT)}
        bases = {leaf: self.inputs(leaf, input_env, {}) for leaf in plan.ranked(MERGED)}
        grams = {
            at: site.gram(site.inputs(env[site.operand]), bases[site.leaf], self.precision)
            for at, site in plan.sites.items()
            if plan.kinds[site.leaf] == MERGED and self.steps > 1
        }
        blocks: dict[int, list[tuple[jax.Array, jax.Array]]] = {leaf: [] for leaf in plan.ranked(DUAL)}
        coordinates = {leaf: self._zeros(leaf, env) for leaf in plan.ranked(DUAL, MERGED)}
        gradients = jax.checkpoint(self.gradients) if self.remat else self.gradients

        def step(carry: Any, k: Any) -> Any:
            values, coordinates, state, finite = carry
            first = isinstance(k, int) and k == 0
            factors = {} if first else {leaf: self._factors(leaf, bases, blocks, coordinates) for leaf in coordinates}
            gradient, taps, site_inputs, value = gradients(env, target, mask, values, factors, grams)
            finite &= jnp.isfinite(value)
            moves = {}
            for leaf in coordinates:
                inputs = bases[leaf] if leaf in bases else self.inputs(leaf, input_env, site_inputs)
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
            return (values, coordinates, state, finite), None

        carry = (values, coordinates, self.optimizer.init(self._tree(values, coordinates)), jnp.array(True))
        carry = varying(carry, mask)
        unrolled = UNROLLED if jax.default_backend() == "cpu" else UNROLLED_ELSEWHERE
        looped = self.steps > unrolled and not blocks
        for k in range(1 if looped else self.steps):  # the first step is never in the scan: its weights are shared
            carry, _ = step(carry, k)
        if looped:
            carry, _ = jax.lax.scan(step, carry, jnp.arange(1, self.steps))
        values, coordinates, _, finite = carry
        entries: dict[int, Any] = {leaf: Explicit(value) for leaf, value in values.items()}
        for leaf in coordinates:
            axes = plan.sites[plan.sites_of(leaf)[0]].axes
            entries[leaf] = Factored(*self._factors(leaf, bases, blocks, coordinates), axes)
        return entries, finite & self._finite(entries, env)

    def _finite(self, entries: dict[int, Explicit | Factored], env: dict[int, Any]) -> jax.Array:
        """Return whether every number of one user's entries is finite, checking as few numbers as needed.

        A fixed layer's outputs are checked instead of its inputs if they are narrower: a non-finite input makes an
        output non-finite. An overflowing sum of finite inputs does so too.
        """
        plan, numbers = self.plan, []
        for leaf, entry in entries.items():
            if isinstance(entry, Explicit):
                # The barrier keeps a GPU from fusing this reduction with those that compute the values.
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
        """Compute one step's support loss and gradients.

        Returns:
          Gradients at the explicit leaves, gradients at the sites' outputs, inputs of the sites that are not fixed,
          and the loss.
        """
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
        zeros = varying({at: jnp.zeros(a.shape, a.dtype) for at, a in outputs.items()}, mask)
        (value, site_inputs), (gradient, taps) = jax.value_and_grad(support_loss, (0, 1), has_aux=True)(values, zeros)
        if self.first_order:
            gradient, taps, site_inputs = jax.lax.stop_gradient((gradient, taps, site_inputs))
        return gradient, taps, site_inputs, value

    def _tree(self, values: dict[int, Any], coordinates: dict[int, Any]) -> Params:
        both = {**values, **coordinates}
        return jax.tree.unflatten(self.tree, [both[leaf] for leaf in self.plan.kinds])

    def _zeros(self, leaf: int, env: dict[int, Any]) -> jax.Array:
        """Return a leaf's initial coordinates, all 0, with as many axes as the leaf has.

        The optimiser is linear, so it can update coordinates instead of the leaf. MERGED: the factor `[rows, out]` that
        multiplies the constant inputs X. DUAL: `[steps]` coefficients of the gradients of the steps.
        """
        w = env[self.plan.program.inputs[0][leaf]]
        sites = [self.plan.sites[at] for at in self.plan.sites_of(leaf)]
        if self.plan.kinds[leaf] == DUAL:
            return jnp.zeros((self.steps,) + (1,) * (w.ndim - 1), w.dtype)
        axes = (0,) if sites[0].axes is None else sites[0].axes
        free = [n for axis, n in enumerate(w.shape) if axis not in axes]
        return jnp.zeros((sum(site.rows for site in sites), *(1,) * (len(axes) - 1), *free), w.dtype)

    def inputs(self, leaf: int, env: dict[int, Any], site_inputs: dict[int, Any]) -> jax.Array:
        """Return the inputs of a layer at all its sites, `[rows, in]`, times the step size if that is per row."""
        sites, both = [self.plan.sites[at] for at in self.plan.sites_of(leaf)], {**env, **site_inputs}
        rows = [site.inputs(both[site.operand]) for site in sites]
        inputs = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
        _, scale = self._step(leaf)
        return inputs if scale is None or sites[0].axes is None else inputs * scale

    def _outputs(self, leaf: int, taps: dict[int, Any], inputs: jax.Array) -> jax.Array:
        """Return the gradients at a layer's outputs at all its sites, `[rows, out]`, times the step size."""
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
        """Return a factored leaf's step size as `step_factors`."""
        site = self.plan.sites[self.plan.sites_of(leaf)[0]]
        shape = self.plan.program.shapes[self.plan.program.inputs[0][leaf]].shape
        factors = step_factors(self.plan.step_sizes[leaf], shape, site.axes)
        assert factors is not None  # `_plan._kind` makes other leaves EXPLICIT
        return factors

    def _factors(self, leaf: int, bases: dict, blocks: dict, coordinates: dict) -> tuple[jax.Array, jax.Array]:
        """Return `inputs` and `outputs` of a leaf's `Factored` form after the steps so far."""
        if leaf in bases:
            width = self.plan.sites[self.plan.sites_of(leaf)[0]].outputs
            return bases[leaf], coordinates[leaf].reshape(bases[leaf].shape[0], width)
        inputs, outputs = zip(*blocks[leaf], strict=True)
        coefficients = coordinates[leaf].reshape(self.steps)[: len(outputs)]
        weighted = [c * d for c, d in zip(coefficients, outputs, strict=True)]
        return (inputs[0], weighted[0]) if len(inputs) == 1 else (jnp.concatenate(inputs), jnp.concatenate(weighted))


def isolated(run: Callable[..., Any], leaves: list[jax.Array], support: Examples) -> tuple[Any, jax.Array]:
    """Return `run(leaves, support)` with failed users isolated: no gradient, and shared values of explicit leaves.

    Factored entries of failed users are left as they are: callers must mask failed users.

    Zero cotangents would not isolate a failed user, because 0 times infinity is NaN. So if any user failed, the
    backward pass is rerun with a healthy user's examples in place of theirs. This costs nothing if no user failed.
    Exception: `vmap` over parameters (an ensemble) turns the branch into a selection and runs both passes.
    """
    pure, consts = jax.closure_convert(run, leaves, support)
    args, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, (leaves, support, consts)))
    real = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def outputs(reals: list[jax.Array], args: list[jax.Array], finite: jax.Array | None) -> Any:
        both = dict(enumerate(args)) | dict(zip(real, reals, strict=True))
        leaves, support, consts = jax.tree.unflatten(structure, [both[i] for i in range(len(args))])
        entries, now = pure(leaves, support if finite is None else healthy(support, finite), *consts)
        entries = shared_where_failed(entries, leaves, now) if finite is None else reset(entries, leaves, finite)
        flat, tree = jax.tree.flatten(entries)
        return {i: a for i, a in enumerate(flat) if jnp.issubdtype(a.dtype, jnp.inexact)}, (flat, tree, now)

    def primal(*args: jax.Array) -> Any:
        _, (flat, tree, finite) = outputs([args[i] for i in real], list(args), None)
        return jax.tree.unflatten(tree, flat), finite

    def forward(*args: jax.Array) -> Any:
        reals = [args[i] for i in real]
        _, back, (flat, tree, finite) = jax.vjp(lambda r: outputs(r, list(args), None), reals, has_aux=True)
        return (jax.tree.unflatten(tree, flat), finite), (back, args, finite)

    def backward(residuals: Any, bar: Any) -> tuple[Any, ...]:
        back, args, finite = residuals
        cotangents_in = {i: a for i, a in enumerate(jax.tree.leaves(bar[0])) if a.dtype != jax.dtypes.float0}

        def rerun() -> Any:
            _, pull, _ = jax.vjp(lambda r: outputs(r, list(args), finite), [args[i] for i in real], has_aux=True)
            return pull(cotangents_in)

        (real_cotangents,) = jax.lax.cond(jnp.all(finite), lambda: back(cotangents_in), rerun)
        cotangents = dict(zip(real, real_cotangents, strict=True))
        return tuple(cotangents.get(i, np.zeros(a.shape, jax.dtypes.float0)) for i, a in enumerate(args))

    rule = jax.custom_vjp(primal)
    rule.defvjp(forward, backward)
    return rule(*args)


def choose(finite: jax.Array, value: jax.Array, fallback: Any) -> jax.Array:
    """Select `value` `[users, ...]` for users that are `finite` (`[users]` or `[users, members]`), else `fallback`."""
    where = finite.reshape(*finite.shape, *(1,) * (value.ndim - finite.ndim))
    return jnp.where(where, value, jnp.asarray(fallback, value.dtype))


def shared_where_failed(entries: dict[int, Any], leaves: list[jax.Array], finite: jax.Array) -> dict[int, Any]:
    """Replace explicit leaves of failed users by the shared values."""
    return {
        leaf: Explicit(choose(finite, entry.value, leaves[leaf])) if isinstance(entry, Explicit) else entry
        for leaf, entry in entries.items()
    }


def reset(entries: dict[int, Any], leaves: list[jax.Array], finite: jax.Array) -> dict[int, Any]:
    """Reset failed users to the shared parameters."""
    explicit = shared_where_failed(entries, leaves, finite)
    return {leaf: _zeros_where_failed(entry, finite) for leaf, entry in explicit.items()}


def settled(adapted: Adapted) -> Adapted:
    """Return a copy of `adapted` where the factored corrections of failed users are 0."""
    return replace(adapted, leaves=tuple(_zeros_where_failed(entry, ~adapted.failed) for entry in adapted.leaves))


def _zeros_where_failed(entry: Any, finite: jax.Array) -> Any:
    return jax.tree.map(partial(choose, finite, fallback=0), entry) if isinstance(entry, Factored) else entry


def healthy(support: Examples, finite: jax.Array) -> Examples:
    """Replace the examples of failed users by those of a healthy user, with mask 0.

    The healthy user is summed out of the batch: over devices, its examples are all that is sent.
    """
    support = jax.tree.map(jnp.asarray, support)
    return _healthy(support, finite) if len(finite) else support


def _healthy(support: Examples, finite: jax.Array) -> Examples:
    chosen = finite & (jnp.arange(len(finite)) == jnp.argmax(finite))  # none if all users failed

    def swap(a: jax.Array) -> jax.Array:
        own = choose(chosen, a, 0)
        return choose(finite, a, own.any(0) if a.dtype == bool else own.sum(0, dtype=a.dtype))

    return Examples(jax.tree.map(swap, support.features), swap(support.target), choose(finite, support.mask, 0))


def as_precision(precision: Any) -> Any:
    """Validate `precision`; `jnp.bfloat16` becomes the algorithm with bfloat16 inputs and float32 sums."""
    if precision is not None and not isinstance(precision, jax.lax.DotAlgorithmPreset | jax.lax.Precision | str):
        if jnp.dtype(precision) != jnp.bfloat16:
            raise ValueError(f"precision must be None, a jax.lax.Precision or jnp.bfloat16, got {precision!r}")
        return jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return precision


def with_precision(program: Program, precision: Any) -> dict[int, Callable[..., jax.Array]]:
    """Return replacements for the program's matrix products that run at `precision`."""

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
