"""Implicit MAML: the meta-gradient at the minimum of a regularised inner problem.

The inner loop is not differentiated, so memory does not grow with its steps. The gradient is computed by conjugate
gradients instead.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.core._loop import Adapted, Explicit, Factored, Loop, as_precision, choose, healthy, reset
from metarec_jax.core._plan import EXPLICIT, MERGED, make_plan
from metarec_jax.core._spmd import automatic, varying
from metarec_jax.core.inner import check_count, partition
from metarec_jax.types import Apply, Examples, Params, PointwiseLoss


class ProximalState(NamedTuple):
    """State of `proximal`: the wrapped optimiser's state and the parameters' displacement."""

    inner: Any
    moved: Params  # the sum of all updates, w - params


def proximal(optimizer: optax.GradientTransformation, damping: Params) -> optax.GradientTransformation:
    """Run `optimizer` on the loss plus `damping / 2 |w - w_0|^2`, with `w_0` the parameters at `init`.

    Args:
      optimizer: any optax transformation.
      damping: a number, or a pytree prefix of the parameters with a number for each array or subtree.

    Example:
      The gradient of the loss is 1 twice. After the first step, -0.5, the proximal term adds -0.5 to it:

      >>> import optax
      >>> optimizer = mr.core.implicit.proximal(optax.sgd(0.5), damping=1.0)
      >>> updates, state = optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))
      >>> updates, optimizer.update(jnp.ones(1), state)[0]
      (Array([-0.5], dtype=float32), Array([-0.25], dtype=float32))
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
    """Minimise each user's regularised support loss and differentiate the minimum implicitly (iMAML).

        w* = argmin_w L_support(w) + damping / 2 |w - params|^2,   dw*/dparams = (I + H / damping)^-1

    with H the Hessian of L_support at w*. Differentiable once, in `params`, in reverse mode; `apply` and `loss` must
    not close over differentiated values. The gradient formula assumes the exact minimum: its error depends on how far
    the inner loop and the conjugate gradients have converged.

    Tables and layers whose input depends on no adapted leaf stay factored, in the Hessian products too. Deeper layers
    have per-user weights.

    Args:
      apply: `apply(params, features) -> scores`, for one user: features `[examples, ...]`, scores `[examples]`.
      params: shared parameters, a pytree.
      support: support set, arrays `[users, examples, ...]`.
      damping: strength of the proximal term, lambda of the paper; a number above 0.
      loss: elementwise loss of scores and targets; its weighted mean over a user's support is minimised.
      optimizer: of the inner problem, any optax transformation (default `optax.sgd(0.1)`).
      steps: number of inner steps.
      adapted: which leaves adapt: a pytree of Python bools, or a prefix of one.
      iterations: number of conjugate-gradient iterations.
      count, form, precision: as in `fastweights.adapt`.

    Returns:
      `Adapted`, for `fastweights.predict`; failed users keep the shared parameters.

    Raises:
      ValueError: `damping` is not positive, `steps` is less than 1, or `iterations` or `count` is negative.

    Example:
      The minimum of (w - 2)^2 + damping / 2 w^2 with damping = 2 is at w = 1:

      >>> support = mr.Examples(jnp.ones((1, 1, 1)), jnp.array([[2.0]]), jnp.ones((1, 1)))  # one user, one example
      >>> apply, w = lambda w, x: x @ w, jnp.zeros(1)
      >>> adapt = jax.jit(lambda w: mr.core.implicit.adapt(apply, w, support, damping=2.0, steps=40))
      >>> np.asarray(mr.core.weights(w, adapt(w))).round(3)
      array([[1.]], dtype=float32)

    References:
      Rajeswaran et al., Meta-Learning with Implicit Gradients, NeurIPS 2019, eq. 6 and algorithm 2.
    """
    if damping <= 0 or steps < 1 or iterations < 0:
        raise ValueError(
            f"damping must be more than 0, steps 1 or more, iterations 0 or more; got {damping}, {steps}, {iterations}"
        )
    check_count(count)
    pulled, precision = proximal(optax.sgd(0.1) if optimizer is None else optimizer, damping), as_precision(precision)

    def run(params: Params, count: float | jax.Array, support: Examples) -> Adapted:
        params = varying(params, support.mask)
        leaves, start = jax.tree.leaves(params), partition(params, adapted)
        plan = make_plan(apply, params, support.features, start, pulled, steps, adapted, 1.0, form, kept=(MERGED,))
        loop = Loop(plan, jax.tree.structure(start), loss, pulled, steps, True, count, False, precision)
        coordinates, finite = _solve(_Problem(loop, damping, iterations), leaves, support)
        shared, still = loop.prepare(leaves, healthy(support, finite).features)
        entries: dict[int, Any] = {}
        for leaf, value in coordinates.items():
            if plan.kinds[leaf] == EXPLICIT:
                entries[leaf] = Explicit(value)
                continue
            axes = plan.sites[plan.sites_of(leaf)[0]].axes
            inputs = jax.vmap(lambda still, leaf=leaf: loop.inputs(leaf, {**shared, **still}, {}))(still)
            entries[leaf] = Factored(choose(finite, inputs, 0), value, axes)
        return Adapted(tuple(entries.get(i) for i in range(len(leaves))), ~finite, precision)

    return automatic(run, params, count, support, like=support.mask)


class _Problem(NamedTuple):
    """The inner problem in coordinates y: the values of an explicit leaf; C for a factored leaf `W + X^T C`.

    The stationarity condition is `damping (y - y_0) + h(S y) = 0`. S maps coordinates to their effect: `X X^T C` at a
    factored layer's outputs, the identity for explicit leaves. h returns the loss gradients at these outputs and
    leaves.
    """

    loop: Loop
    damping: float
    iterations: int

    def minimum(self, leaves: list[jax.Array], support: Examples) -> tuple[dict[int, jax.Array], jax.Array]:
        """Run the inner loop; return the coordinates y `[users, ...]` and whether each user stayed finite `[users]`."""
        entries, finite = self.loop.run(leaves, support)
        entries = reset(entries, leaves, finite)
        return {i: e.value if isinstance(e, Explicit) else e.outputs for i, e in entries.items()}, finite

    def effect(self, env: dict[int, Any], y: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """Compute S y for one user."""
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
        """Compute h for one user: the loss gradients at the outputs and leaves given by `effect`."""
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
        """Compute `damping (y - y_0) + h(S y)`, `[users, ...]`; 0 at the minimum."""
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
        """Solve `(damping + S H) mu = bar` for mu, with H the Jacobian of h.

        `mu = (bar - S kappa) / damping`, where `(damping + H S) kappa = H bar` is solved by conjugate gradients in the
        inner product `<a, S b>`, which makes the operator symmetric. This is the paper's iteration on full weights,
        written in coordinates.
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
    """Return `problem.minimum` with an implicit gradient in `leaves` and in the support's targets and mask."""

    def forward(leaves: list[jax.Array], support: Examples) -> Any:
        y, finite = problem.minimum(leaves, support)
        return (y, finite), (y, finite, leaves, support)

    def backward(residuals: Any, bar: Any) -> Any:
        y, finite, leaves, support = residuals
        replaced = healthy(support, finite)
        mu = problem.adjoint(y, bar[0], leaves, replaced)

        def stationarity(leaves: list[jax.Array], target: jax.Array, mask: jax.Array) -> dict[int, jax.Array]:
            replaced = healthy(support._replace(target=target, mask=mask), finite)
            return problem.stationarity(y, leaves, replaced)

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
    """Solve `operator(x) = right`; the operator is symmetric positive in the inner product `<a, metric(b)>`.

    Stops where the curvature is not positive: after convergence, or away from a minimum (Steihaug, 1983).
    """

    def step(carry: Any, _: None) -> tuple[Any, None]:
        x, residual, direction, size = carry
        image = operator(direction)
        curvature = _inner(direction, metric(image))
        active = (curvature > 0) & (size > 0)
        length = jnp.where(active, size / jnp.where(active, curvature, 1), 0)
        x, residual = _add(x, direction, length), _add(residual, image, -length)
        new_size = _inner(residual, metric(residual))
        next_direction = _add(residual, direction, new_size / jnp.where(active, size, 1))
        return (x, residual, jax.tree.map(lambda d: jnp.where(active, d, 0), next_direction), new_size), None

    start = (jax.tree.map(jnp.zeros_like, right), right, right, _inner(right, metric(right)))
    return jax.lax.scan(step, start, length=iterations)[0][0]


def _add(a: Params, b: Params, scale: Any) -> Params:
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def _inner(a: Params, b: Params) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), jnp.zeros(()))
