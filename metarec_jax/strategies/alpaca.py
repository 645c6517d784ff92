"""ALPaCA: Bayesian linear regression on meta-learned features, with a meta-learned prior and calibrated uncertainty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.core.solve import inverse_cholesky, normal_per_key
from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import need_embed
from metarec_jax.strategies.likelihood import likelihood
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task


class Posterior(NamedTuple):
    """Posterior N(mean, V) of each user's correction of the shared head; the last entry is the bias.

    V = C C' if there are more examples than features, else the prior minus a low-rank term: L L' - R' R.

    Attributes:
      mean: `[users, width + 1]`.
      factor: `[users, width + 1, width + 1]`, C, or None.
      taken: `[users, examples, width + 1]`, R, or None.
    """

    mean: jax.Array
    factor: jax.Array | None
    taken: jax.Array | None


def alpaca(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    full: bool = True,
    scale: float = 1.0,
    noise: float = 1.0,
    steps: int = 5,
) -> Strategy:
    """Bayesian last layer: each user's head has a Gaussian posterior, from a prior meta-learned with the features.

        d_u ~ N(0, L L'),   score(x) = f(x) + [phi(x), 1] . d_u,   y = score + N(0, s^2)
        V = (sum_{i in support} x_i x_i' / s^2 + (L L')^-1)^-1,   m = V sum_i x_i (y_i - f(x_i)) / s^2
        meta-loss = -mean_u mean_{query} log N(y; f(x) + x . m, x' V x + s^2)

    f is the shared model, whose head is the prior mean; phi is the input of that head. In products, x stands for
    [phi(x), 1]. f, phi, L and s are learned.

    With the logistic loss, the target is Bernoulli(sigmoid(score)) and the posterior is a Laplace approximation: m is
    the mode, found by Newton steps, and V the inverse Hessian there. Gradients pass through the last step only, which
    is exact at the mode. `predict` then returns the logit of the predictive probability (MacKay's approximation)

        m(x) / sqrt(1 + pi v(x) / 8),   m(x) = f(x) + x . m,   v(x) = x' V x

    `deviation` returns the predictive standard deviation: sqrt(v + s^2) of the target, or sqrt(v) of the click's logit.

    Args:
      model: needs `embed` and `width`.
      loss: squared error or logistic loss, read as a negative log-likelihood.
      full: learn a full lower triangular L; else a diagonal one.
      scale: initial standard deviation of the prior, L = scale I. An outer penalty draws it, and the noise, to 1.
      noise: initial s; only for the squared error.
      steps: Newton steps; only for the logistic loss, because one step is exact for the squared error.

    Raises:
      ValueError: the model lacks `embed` or `width`, another loss, or a number that is not positive.

    Differs from the paper:
      - For clicks (logistic loss) the posterior is a Laplace approximation, and predictions use MacKay's approximation
        of the logistic-normal integral. The paper treats regression, which is the squared error here.
      - The prior is parameterised by L, in whose coordinates the Hessian is never below the identity; the paper uses
        its precision.
      - s is learned; the paper takes the noise as known.

    References:
      Harrison et al., Meta-Learning Priors for Efficient Online Bayesian Regression, WAFR 2018, section 3.
      MacKay, The Evidence Framework Applied to Classification Networks, Neural Computation 1992, section 2.
    """
    embed, width = need_embed(model)
    kind = likelihood(loss)
    if kind is None:
        raise ValueError("alpaca needs a loss that is a negative log-likelihood: squared error or logistic loss")
    if steps < 1 or scale <= 0 or noise <= 0:
        raise ValueError(f"need steps >= 1, scale > 0 and noise > 0, got {steps=}, {scale=}, {noise=}")

    def init(key: jax.Array) -> Params:
        params = {"model": model.init(key), "log_scale": jnp.full(width + 1, jnp.log(scale), jnp.float32)}
        if full:
            params["below"] = jnp.zeros((width + 1, width + 1))
        if kind == "gaussian":
            params["log_noise"] = jnp.log(jnp.float32(noise))
        return params

    def cholesky(params: Params) -> jax.Array:
        """Return L = diag(scale) (I + strictly lower triangle)."""
        unit = jnp.eye(width + 1) + (jnp.tril(params["below"], -1) if full else 0.0)
        return jnp.exp(params["log_scale"])[:, None] * unit

    def inputs(params: Params, features: Features) -> jax.Array:
        phi = embed(params["model"], features)
        return jnp.concatenate([phi, jnp.ones_like(phi[..., :1])], -1)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Posterior:
        keep, prior = support.mask > 0, cholesky(params)
        z = jnp.where(keep[..., None], inputs(params, support.features), 0.0) @ prior  # d_u = L a, a ~ N(0, I)
        shared = jnp.where(keep, model.apply(params["model"], support.features), 0.0)
        target, weight = jnp.where(keep, support.target, 0.0), jnp.where(keep, support.mask, 0.0)
        precision = jnp.exp(-2 * params["log_noise"]) if kind == "gaussian" else None
        inner = _Inner(z, shared, target, weight, loss, precision)
        at = jnp.zeros((z.shape[0], width + 1), z.dtype)
        if kind == "bernoulli":  # no gradient passes through these steps, so a fori_loop will do
            at = jax.lax.fori_loop(0, steps - 1, lambda _, at: jax.lax.stop_gradient(inner.newton(at)), at)
        at = inner.newton(jax.lax.stop_gradient(at))
        _, curvature = inner.derivatives(at)
        if inner.few:
            return Posterior(at @ prior.T, None, inner.whitened(curvature) @ prior.T)
        return Posterior(at @ prior.T, jnp.einsum("fg,uhg->ufh", prior, inner.root(curvature)), None)

    def moments(params: Params, posterior: Posterior, features: Features) -> tuple[jax.Array, jax.Array]:
        """Return mean and variance of the score, without noise, `[users, examples]`."""
        x = inputs(params, features)
        mean = model.apply(params["model"], features) + jnp.einsum("unf,uf->un", x, posterior.mean)
        if posterior.factor is not None:
            return mean, jnp.square(jnp.einsum("unf,ufg->ung", x, posterior.factor)).sum(-1)
        taken = jnp.square(jnp.einsum("unf,umf->unm", x, posterior.taken)).sum(-1)
        return mean, jnp.maximum(jnp.square(x @ cholesky(params)).sum(-1) - taken, 0.0)

    def predict(params: Params, posterior: Posterior, features: Features) -> jax.Array:
        mean, variance = moments(params, posterior, features)
        return mean if kind == "gaussian" else mean / jnp.sqrt(1 + jnp.pi * variance / 8)

    def deviation(params: Params, posterior: Posterior, features: Features) -> jax.Array:
        _, variance = moments(params, posterior, features)
        return jnp.sqrt(variance + jnp.exp(2 * params["log_noise"]) if kind == "gaussian" else variance)

    def sample(params: Params, posterior: Posterior, keys: jax.Array, strength: jax.Array) -> Posterior:
        factor = posterior.factor
        if factor is None:
            assert posterior.taken is not None
            prior = cholesky(params)
            covariance = prior @ prior.T - jnp.einsum("unf,ung->ufg", posterior.taken, posterior.taken)
            size = jnp.trace(covariance, axis1=1, axis2=2)[:, None, None] / (width + 1)
            factor = jnp.linalg.cholesky(covariance + 1e-5 * size * jnp.eye(width + 1))  # rounding may leave -1e-7
        drawn = jnp.einsum("ufg,ug->uf", factor, normal_per_key(keys, width + 1))
        return Posterior(posterior.mean + strength * drawn, jnp.zeros_like(factor), None)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        posterior = adapt(params, task.support, key)
        if kind == "bernoulli":
            return query_loss(predict(params, posterior, task.query.features), task.query, loss), {}
        mean, variance = moments(params, posterior, task.query.features)
        variance += jnp.exp(2 * params["log_noise"])
        error = jnp.where(task.query.mask > 0, task.query.target, 0.0) - mean
        nll = 0.5 * (jnp.square(error) / variance + jnp.log(2 * jnp.pi * variance))
        return query_loss(nll, task.query, lambda value, _: value), {}

    return Strategy(init, adapt, predict, meta_loss, deviation, sample=sample)


class _Inner(NamedTuple):
    """Each user's posterior density of `at` `[users, width + 1]`, in coordinates in which its prior is N(0, I).

    Attributes:
      z: `[users, examples, width + 1]` inputs; 0 for padding, as in all other arrays.
      shared: `[users, examples]` scores of the shared model.
      target, weight: `[users, examples]`.
      loss: elementwise negative log-likelihood, up to the factor `precision`.
      precision: 1 / s^2 of a Gaussian, None if the target is Bernoulli.
    """

    z: jax.Array
    shared: jax.Array
    target: jax.Array
    weight: jax.Array
    loss: PointwiseLoss
    precision: jax.Array | None

    @property
    def few(self) -> bool:
        """Whether there are no more examples than features: systems are then smaller in the space of examples."""
        return self.z.shape[1] < self.z.shape[2]

    def scores(self, at: jax.Array) -> jax.Array:
        return self.shared + jnp.einsum("unf,uf->un", self.z, at)

    def derivatives(self, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the gradient and the examples' curvatures of the negative log posterior.

        The Hessian is H = z' diag(curvatures) z + I.

        Returns:
          `[users, width + 1]` and `[users, examples]`.
        """
        scores = self.scores(at)
        if self.precision is not None:
            curvature = jnp.full_like(scores, self.precision)
            slope = curvature * (scores - self.target)
        else:
            slope = jax.nn.sigmoid(scores) - self.target
            curvature = jax.nn.sigmoid(scores) * jax.nn.sigmoid(-scores)
        return jnp.einsum("unf,un->uf", self.z, self.weight * slope) + at, self.weight * curvature

    def whitened(self, curvature: jax.Array) -> jax.Array:
        """Return B with H^-1 = I - B' B, by Woodbury's identity in the space of the examples."""
        positive = curvature > 0
        half = jnp.where(positive, jnp.sqrt(jnp.where(positive, curvature, 1.0)), 0.0)[..., None] * self.z
        return inverse_cholesky(half @ jnp.swapaxes(half, 1, 2) + jnp.eye(self.z.shape[1])) @ half

    def root(self, curvature: jax.Array) -> jax.Array:
        """Return C with H^-1 = C' C."""
        return inverse_cholesky(jnp.einsum("unf,un,ung->ufg", self.z, curvature, self.z) + jnp.eye(self.z.shape[2]))

    def solve(self, curvature: jax.Array, right: jax.Array) -> jax.Array:
        """Return H^-1 times `right`."""
        half = self.whitened(curvature) if self.few else self.root(curvature)
        product = jnp.einsum("ugf,ugh,uh->uf", half, half, right)
        return right - product if self.few else product

    def newton(self, at: jax.Array) -> jax.Array:
        """Take a Newton step from `at`: exact for a Gaussian, with a line search otherwise."""
        gradient, curvature = self.derivatives(at)
        step = -self.solve(curvature, gradient)
        return at + (step if self.precision is not None else self.length(at, step, gradient)[:, None] * step)

    def length(self, at: jax.Array, step: jax.Array, gradient: jax.Array) -> jax.Array:
        """Return the step length, `[users]`: the first of 1, 1/2, 1/4 ... that decreases the loss enough (Armijo).

        A full step overshoots where all of a user's scores are wrong.
        """

        def value(length: jax.Array) -> jax.Array:
            new = at + length * step
            return (self.weight * self.loss(self.scores(new), self.target)).sum(-1) + 0.5 * jnp.square(new).sum(-1)

        lengths, before = 0.5 ** jnp.arange(8), value(jnp.zeros(()))
        rounding = 1e-5 * (1 + jnp.abs(before))
        decrease = 0.1 * lengths[:, None] * (gradient * step).sum(-1) + rounding
        enough = jax.vmap(value)(lengths) <= before + decrease
        return jax.lax.stop_gradient(lengths[jnp.argmax(enough, axis=0)])
