"""Plan an inner loop: the form of each adapted leaf, and which ops run once or at every step."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import _trace
from metarec_jax.core._spmd import spec
from metarec_jax.core._trace import Program, Site
from metarec_jax.types import Apply, Features, Params

EXPLICIT, DUAL, MERGED = "explicit", "dual", "merged"


class PlainFormWarning(UserWarning):
    """Warning that a weight cannot stay factored and gets per-user values: same result, more memory."""


class Plan(NamedTuple):
    """The plan of one call of `adapt`. Leaves are numbered as in `jax.tree.leaves(params)`, ops by position."""

    program: Program
    kinds: dict[int, str]  # adapted leaf -> EXPLICIT, DUAL or MERGED
    sites: dict[int, Site]  # op -> its use of a factored leaf
    step_sizes: dict[int, Any]
    shared: list[int]  # ops that do not depend on the user
    still: list[int]  # ops that depend on the user but on no adapted leaf: evaluated once
    moving: list[int]  # ops evaluated at every inner step
    carried: list[int]  # values of `still` ops that `moving` ops read

    def ranked(self, *kinds: str) -> list[int]:
        """Return the adapted leaves of the given kinds."""
        return [leaf for leaf, kind in self.kinds.items() if kind in kinds]

    def sites_of(self, leaf: int) -> list[int]:
        """Return the ops that use a factored leaf."""
        return [at for at, site in self.sites.items() if site.leaf == leaf]


def costs(rows: int, width: int, outputs: int, steps: int, merged: bool) -> tuple[float, float]:
    """Estimate a layer's cost per user for the inner loop and the query: (factored, per-user weights).

    Counts the multiplications of matrix products: forward, weight gradient and input gradient (none for a merged
    layer). Products with shared weights have weight 1. Per-user products are small and slower: weight 3 with per-user
    weights, 5 with low-rank corrections. Both costs are proportional to the number of users, which is left out.

    Args:
      rows: support examples (times tokens) that the layer reads; the query is assumed to have half as many.
      width, outputs: input and output width of the layer.
      steps: number of inner steps K.
      merged: whether the layer's input is the same at every step.

    Measured on two CPU cores with 10 query examples: time of a full meta-gradient with a plain hidden layer, divided
    by the time with a dual one.

        rows  in x out    K=1   K=2   K=3   K=5
           8   64 x 64   1.26  1.27  1.11  0.98
           8  256 x 128  4.03  3.45  3.23  2.55
          20   64 x 64   1.36  0.97  0.83  0.63
          20  256 x 128  2.74  2.30  2.18  1.41
          50   64 x 64   1.28  0.73  0.61  0.39
          50  256 x 128  1.97  1.30  0.92  0.82
    """
    support_product, query_rows = rows * width * outputs, rows / 2
    query_product, side = query_rows * width * outputs, width + outputs
    if merged:
        explicit = support_product + 3 * ((2 * steps - 1) * support_product + query_product)
        support_corrections = (rows * rows * width if steps > 1 else 0) + (steps - 1) * rows * rows * outputs
        return support_product + query_product + 5 * (support_corrections + query_rows * rows * side), explicit
    explicit = 2 * support_product + 3 * ((3 * steps - 2) * support_product + query_product)
    correction = steps * (steps - 1) * rows * rows * side + query_rows * steps * rows * side
    return 2 * steps * support_product + query_product + 5 * correction, explicit


def make_plan(
    apply: Apply,
    params: Params,
    features: Features,
    start: Params,
    optimizer: optax.GradientTransformation,
    steps: int,
    adapted: Params,
    step_size: Params,
    form: Params,
    kept: tuple[str, ...] = (DUAL, MERGED),
) -> Plan:
    """Build the plan of one call of `adapt`; leaves whose kind is not in `kept` become EXPLICIT."""
    flags = jax.tree.leaves(jax.tree.map(lambda m, sub: jax.tree.map(lambda _: bool(m), sub), adapted, params))
    numbers = [leaf for leaf, flag in enumerate(flags) if flag]
    program = _trace.model(apply, params, one_user(features), numbers)
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
        details = "; ".join(f"{paths[leaf]}: {reason}" for leaf, reason in reasons.items())
        name = getattr(apply, "__qualname__", type(apply).__name__)
        warnings.warn(
            f"{name}: some leaves cannot stay factored and get per-user weights; same result, more memory. {details}.",
            PlainFormWarning,
            stacklevel=3,
        )
    sites = {at: site for at, site in roles.sites.items() if kinds[site.leaf] != EXPLICIT}
    return _schedule(program, kinds, sites, sizes, numbers)


def _kind(
    leaf: int, roles: _trace.Roles, linear: _trace.Linearity, size: Any, form: str, w: jax.Array, steps: int
) -> tuple[str, str | None]:
    """Choose the kind of one adapted leaf; a reason is returned if the leaf cannot be factored."""
    if form not in ("auto", "dual", "plain"):
        raise ValueError(f'form must be "auto", "dual" or "plain", got {form!r}')
    if form == "plain":
        return EXPLICIT, None
    uses = [site for site in roles.sites.values() if site.leaf == leaf]
    if not uses:
        return EXPLICIT, roles.reasons[leaf]
    if not (linear.own and linear.linear):
        return EXPLICIT, "the optimizer is not linear in its gradient"
    if step_factors(size, jnp.shape(w), uses[0].axes) is None:
        return EXPLICIT, f"its step size has shape {jnp.shape(size)}, one per weight; use a scalar, [out] or [in, 1]"
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


def _schedule(program: Program, kinds: dict[int, str], sites: dict[int, Site], sizes: Any, numbers: Any) -> Plan:
    """Sort the ops by what they depend on, so that each is evaluated only when its inputs change."""
    user = program.dependents(program.inputs[1])
    moving = program.dependents([program.inputs[0][leaf] for leaf in numbers])
    plan = Plan(program, kinds, sites, sizes, [], [], [], [])
    read = {atom for atom in program.outputs if isinstance(atom, int)}
    for at, op in enumerate(program.ops):
        if not op.outputs:  # an effect such as a debug print
            plan.moving.append(at)
            read.update(atom for atom in op.inputs if isinstance(atom, int))
            continue
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


def step_factors(size: Any, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[Any, Any] | None:
    """Split a step size into (per column `[out]`, per row `[in]`), one of them None; None if it is neither.

    A step size of 1 gives (None, None).
    """
    if isinstance(size, int | float) and size == 1:
        return None, None
    dims = (1,) * (len(shape) - jnp.ndim(size)) + jnp.shape(size)
    if len(dims) > len(shape):
        return None
    axes = (0,) if axes is None else axes
    free = tuple(a for a in range(len(shape)) if a not in axes)
    if all(dims[a] == 1 for a in axes):
        wide = jnp.broadcast_to(jnp.reshape(size, [dims[a] for a in free]), [shape[a] for a in free])
        return wide.reshape(-1), None
    if all(dims[a] == 1 for a in free):
        return None, jnp.broadcast_to(jnp.reshape(size, [dims[a] for a in axes]), [shape[a] for a in axes]).reshape(-1)
    return None


def one_user(features: Features) -> Features:
    """Return the shapes and dtypes of one user's features."""
    return jax.tree.map(lambda a: spec(a, a.shape[1:]), features)


def _spread(prefix: Params, start: Params) -> list[Any]:
    """Broadcast `prefix` to the leaves of `start`."""
    spread = jax.tree.map(
        lambda value, sub: None if sub is None else [value] * len(jax.tree.leaves(sub)),
        prefix,
        start,
        is_leaf=lambda node: node is None,
    )
    return jax.tree.leaves(spread)
