"""Implicit MAML: the meta-gradient at the optimum of a regularised inner problem, whatever path led there.

The inner loop is not differentiated, so its memory does not grow with its steps; conjugate gradients take its place.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.core._loop import Adapted, Explicit, Factored, Loop, as_precision, choose, healthy, reset
from metarec_jax.core._plan import EXPLICIT, MERGED, make_plan
from metarec_jax.core.inner import check_count, partition
from metarec_jax.types import Apply, Examples, Params, PointwiseLoss


class ProximalState(NamedTuple):
    """State of `proximal`: that of the optimiser inside, and how far the parameters have moved."""

    inner: Any
    moved: Params  # the sum of all updates, w - params


def proximal(optimizer: optax.GradientTransformation, damping: Params) -> optax.GradientTransformation:
    """`optimizer` on the loss plus `damping / 2 |w - w_0|^2`, where `w_0` are the parameters at `init`.

    `damping` is a number, or a pytree prefix of the parameters with one for each array or group of arrays.
    """

    def init(params: Params) -> ProximalState:
        return ProximalState(optimizer.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(gradient: Params, state: ProximalState, params: Params = None) -> tuple[Params, ProximalState]:
        pulled = jax.tree.map(lambda c, g, d: g + c * d, jax.tree.broadcast(damping, gradient), gradient, state.moved)
        updates, inner = optimizer.update(pulled, state.inner, params)
        return updates, ProximalState(inner, jax.tree.map(jnp.add, state.moved, updates))

    return optax.GradientTransformation(init, update)


def adapt(
    apply: Apply,
    params: Params,
    support: Examples,
    *,
    damping: float = 1.0,
    loss: PointwiseLoss = optax.losses.squared_error,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 16,
    adapted: Params = True,
    iterations: int = 8,
    count: float = 0.0,
    form: Params = "auto",
    precision: Any = None,
) -> Adapted:
    """Each user's minimum of the support loss near the shared parameters, differentiated implicitly (iMAML).

        w* = argmin_w L_support(w) + damping / 2 |w - params|^2,   dw*/dparams = (I + H / damping)^-1

    with H the Hessian of L_support at w*. Differentiable once, in `params`, in reverse mode; `apply` and
    `loss` must not close over values that are differentiated. The gradient is that of the exact minimum, so
    it is as good as the inner loop and the conjugate gradients are converged. Layers whose input no adapted
    leaf changes, and tables, stay factored throughout, the Hessian products included; deeper layers have
    per-user weights.

    Args:
      apply: `apply(params, features) -> scores`, for one user: features `[examples, ...]`, scores
        `[examples]`.
      params: shared parameters, a pytree.
      support: `[users, examples, ...]` what each user adapts to.
      damping: strength of the pull to the shared parameters, lambda of the paper; a number, more than 0.
      loss: elementwise loss of scores and targets; its mean over a user's real examples is minimised.
      optimizer: of the inner problem, any optax transformation (default `optax.sgd(0.1)`).
      steps: inner steps.
      adapted: which leaves adapt: a pytree of Python bools, or a prefix of one.
      iterations: of conjugate gradients.
      count, form, precision: as in `fastweights.adapt`.

    Returns:
      `Adapted`, read with `fastweights.predict`; users that fail keep the shared parameters.

    Raises:
      ValueError: if `damping` is not positive, `steps` is less than 1, or `iterations` or `count` less than 0.

    References:
      Rajeswaran et al., Meta-Learning with Implicit Gradients, NeurIPS 2019, eq. 6 and algorithm 2.
    """
    if damping <= 0 or steps < 1 or iterations < 0:
        raise ValueError(
            f"damping must be more than 0, steps 1 or more, iterations 0 or more; got {damping}, {steps}, {iterations}"
        )
    check_count(count)
    start = partition(params, adapted)
    pulled = proximal(optax.sgd(0.1) if optimizer is None else optimizer, damping)
    plan = make_plan(apply, params, support.features, start, pulled, steps, adapted, 1.0, form, kept=(MERGED,))
    loop = Loop(plan, jax.tree.structure(start), loss, pulled, steps, True, count, False, as_precision(precision))
    leaves = jax.tree.leaves(params)
    found, fine = _solve(_Problem(loop, damping, iterations), leaves, support)
    shared, still = loop.prepare(leaves, healthy(support, fine).features)
    entries: dict[int, Any] = {}
    for leaf, value in found.items():
        if plan.kinds[leaf] == EXPLICIT:
            entries[leaf] = Explicit(value)
            continue
        axes = plan.sites[plan.sites_of(leaf)[0]].axes
        inputs = jax.vmap(lambda still, leaf=leaf: loop.inputs(leaf, {**shared, **still}, {}))(still)
        entries[leaf] = Factored(choose(fine, inputs, 0), value, axes)
    return Adapted(tuple(entries.get(i) for i in range(len(leaves))), ~fine, loop.precision)


class _Problem(NamedTuple):
    """The inner problem in coordinates y: values of explicit leaves; C where a leaf is `W + X^T C`.

    Stationarity reads `damping (y - y_0) + h(S y) = 0`: h gives the loss gradients at the explicit leaves and
    at the factored layers' outputs, S y what the coordinates do to those (X X^T C at the outputs, themselves
    otherwise).
    """

    loop: Loop
    damping: float
    iterations: int

    def minimum(self, leaves: list[jax.Array], support: Examples) -> tuple[dict[int, jax.Array], jax.Array]:
        entries, fine = self.loop.run(leaves, support)
        entries = reset(entries, leaves, fine)
        return {i: e.value if isinstance(e, Explicit) else e.outputs for i, e in entries.items()}, fine

    def effect(self, env: dict[int, Any], y: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """S y, for one user."""
        plan, effects = self.loop.plan, {}
        for leaf, value in y.items():
            if plan.kinds[leaf] == MERGED:
                inputs, site = self.loop.inputs(leaf, env, {}), plan.sites[plan.sites_of(leaf)[0]]
                value = jnp.matmul(site.gram(inputs, inputs, self.loop.precision), value)
            effects[leaf] = value
        return effects

    def gradients(
        self, env: dict[int, Any], target: jax.Array, mask: jax.Array, effect: dict[int, jax.Array]
    ) -> dict[int, jax.Array]:
        """h, for one user: loss gradients where layers' outputs and explicit leaves are as `effect` says."""
        plan, local = self.loop.plan, dict(env)
        for leaf in plan.ranked(MERGED):
            row = 0
            for at in plan.sites_of(leaf):
                site, (out,) = plan.sites[at], plan.program.ops[at].outputs
                part = effect[leaf][row : row + site.rows]
                local[out] = env[out] + site.unflat(part, env[out].shape)
                row += site.rows
        values = {leaf: effect[leaf] for leaf in plan.ranked(EXPLICIT)}
        gradient, taps, _, _ = self.loop._replace(first_order=False).gradients(local, target, mask, values, {}, {})
        outputs = {
            leaf: jnp.concatenate([plan.sites[at].flat(taps[at]) for at in plan.sites_of(leaf)])
            for leaf in plan.ranked(MERGED)
        }
        return {leaf: gradient[leaf] if leaf in gradient else outputs[leaf] for leaf in plan.kinds}

    def stationarity(self, y: dict[int, jax.Array], leaves: list[jax.Array], support: Examples) -> dict[int, jax.Array]:
        """`damping (y - y_0) + h(S y)`, `[users, ...]`; 0 at the minimum."""
        shared, still = self.loop.prepare(leaves, support.features)

        def user(y: Any, still: Any, target: jax.Array, mask: jax.Array) -> dict[int, jax.Array]:
            env = {**shared, **still}
            slopes = self.gradients(env, target, mask, self.effect(env, y))
            origin = {leaf: leaves[leaf] if self.loop.plan.kinds[leaf] == EXPLICIT else 0 for leaf in y}
            return {leaf: self.damping * (y[leaf] - origin[leaf]) + slopes[leaf] for leaf in y}

        return jax.vmap(user)(y, still, support.target, support.mask)

    def adjoint(
        self, y: dict[int, jax.Array], bar: dict[int, jax.Array], leaves: list[jax.Array], support: Examples
    ) -> dict[int, jax.Array]:
        """mu with `(damping + S H) mu = bar`, H the Jacobian of h: `mu = (bar - S kappa) / damping`.

        `(damping + H S) kappa = H bar` is solved by conjugate gradients in the inner product `<a, S b>`, in
        which it is symmetric: the paper's iteration on whole weights, written in coordinates.
        """
        shared, still = self.loop.prepare(leaves, support.features)

        def user(y: Any, bar: Any, still: Any, target: jax.Array, mask: jax.Array) -> dict[int, jax.Array]:
            env = {**shared, **still}
            effect = partial(self.effect, env)
            at, slopes = effect(y), partial(self.gradients, env, target, mask)

            def hessian(direction: dict[int, jax.Array]) -> dict[int, jax.Array]:
                return jax.jvp(slopes, (at,), (direction,))[1]

            def operator(a: dict[int, jax.Array]) -> dict[int, jax.Array]:
                return _add(hessian(effect(a)), a, self.damping)

            kappa = _conjugate_gradients(operator, effect, hessian(bar), self.iterations)
            return jax.tree.map(lambda b, k: (b - k) / self.damping, bar, effect(kappa))

        return jax.vmap(user)(y, bar, still, support.target, support.mask)


def _solve(problem: _Problem, leaves: list[jax.Array], support: Examples) -> tuple[dict[int, jax.Array], jax.Array]:
    """The minimum in coordinates, with the implicit gradient with respect to `leaves`."""

    def forward(leaves: list[jax.Array], support: Examples) -> Any:
        y, fine = problem.minimum(leaves, support)
        return (y, fine), (y, fine, leaves, support)

    def backward(kept: Any, bar: Any) -> Any:
        y, fine, leaves, support = kept
        fit = healthy(support, fine)
        mu = problem.adjoint(y, bar[0], leaves, fit)

        def stationarity(leaves: list[jax.Array], target: jax.Array, mask: jax.Array) -> dict[int, jax.Array]:
            fit = healthy(support._replace(target=target, mask=mask), fine)
            return problem.stationarity(y, leaves, fit)

        _, pull = jax.vjp(stationarity, leaves, support.target, support.mask)
        cotangent, target, mask = pull(jax.tree.map(jnp.negative, mu))
        return cotangent, Examples(jax.tree.map(_no_cotangent, support.features), target, mask)

    rule = jax.custom_vjp(problem.minimum)
    rule.defvjp(forward, backward)
    return rule(leaves, support)


def _no_cotangent(a: jax.Array) -> Any:
    inexact = jnp.issubdtype(jnp.result_type(a), jnp.inexact)
    return jnp.zeros_like(a) if inexact else np.zeros(jnp.shape(a), jax.dtypes.float0)


def _conjugate_gradients(operator: Any, metric: Any, right: Params, iterations: int) -> Params:
    """Solves `operator(x) = right`; the operator is symmetric, positive in the product `<a, metric(b)>`.

    Stops where curvature is not positive, which is so once converged, and away from a minimum (Steihaug, 1983).
    """

    def step(carry: Any, _: None) -> tuple[Any, None]:
        x, residual, direction, size = carry
        image = operator(direction)
        curvature = _inner(direction, metric(image))
        going = (curvature > 0) & (size > 0)
        length = jnp.where(going, size / jnp.where(going, curvature, 1), 0)
        x, residual = _add(x, direction, length), _add(residual, image, -length)
        now = _inner(residual, metric(residual))
        ahead = _add(residual, direction, now / jnp.where(going, size, 1))
        return (x, residual, jax.tree.map(lambda d: jnp.where(going, d, 0), ahead), now), None

    start = (jax.tree.map(jnp.zeros_like, right), right, right, _inner(right, metric(right)))
    return jax.lax.scan(step, start, length=iterations)[0][0]


def _add(a: Params, b: Params, scale: Any) -> Params:
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def _inner(a: Params, b: Params) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), jnp.zeros(()))
