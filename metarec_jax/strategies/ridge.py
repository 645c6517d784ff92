"""Ridge head: each user's last layer is solved in closed form on meta-learned features (R2-D2, LR-D2)."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.core.solve import solve
from metarec_jax.models.model import Model
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task

Head = dict[str, jax.Array]  # delta [users, width], bias [users]


def ridge(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    steps: int = 1,
    penalty: float = 1.0,
    bias_penalty: float = 1.0,
    faithful: bool = False,
) -> Strategy:
    """Per-user correction of the shared model's head, by `steps` Newton steps on the penalised support loss.

        d_u, b_u ~ argmin_{d, b}  sum_{i in support} loss(f(x_i) + phi(x_i).d + b, y_i) + l/2 |d|^2 + l_b/2 b^2
        score(x) = f(x) + phi(x).d_u + b_u

    f is the shared model and phi the input of its head, both trained through the solution; `b_u` is the user's bias.
    For the squared error one step is exact and this is ridge regression (R2-D2); for the logistic loss it is
    iteratively reweighted least squares (LR-D2). The two penalties l and l_b are meta-learned. Without support
    examples the score is that of the shared model.

    Args:
      model: needs `embed`.
      loss: elementwise loss of scores and targets, convex in the score; used for both the head and the meta-loss.
      steps: Newton steps; more than one matters only for losses that are not quadratic.
      penalty: initial l.
      bias_penalty: initial l_b; not used if `faithful`.
      faithful: solve the whole head, f = 0, with one penalty l_b = l, as in the paper's ridge regression
        (X'X + lambda I)^-1 X'y and logistic regression. Without support, the score is 0.

    Raises:
      ValueError: the model lacks `embed`, or a number is not positive.

    Differs from the paper:
      - Unless `faithful`, the head is a correction of a shared model's score, with a separate penalty for the bias. The
        paper solves the whole head and penalises its distance from zero.
      - There is no learned scale and offset of the score, which R2-D2 needs because it regresses classes.

    Example:
      A user rates item 0 with 2. The minimum of (d + b - 2)^2 + d^2 / 2 + b^2 / 2 is at d = b = 0.8:

      >>> model = mr.Model(init=lambda key: jnp.zeros(2), apply=lambda w, x: x @ w, embed=lambda w, x: x, width=2)
      >>> strategy = mr.ridge(model)
      >>> params = strategy.init(jax.random.key(0))
      >>> items = jnp.eye(2)[None]  # features [users, examples, width] of items 0 and 1
      >>> support = mr.Examples(items[:, :1], jnp.array([[2.0]]), jnp.ones((1, 1)))
      >>> head = jax.jit(strategy.adapt)(params, support, jax.random.key(1))
      >>> np.asarray(jax.jit(strategy.predict)(params, head, items)).round(3)
      array([[1.6, 0.8]], dtype=float32)

    References:
      Bertinetto et al., Meta-learning with Differentiable Closed-form Solvers, ICLR 2019, sections 3.2 and 3.3.
    """
    if model.embed is None:
        raise ValueError("ridge needs a model with `embed`, the features below its head")
    if steps < 1 or penalty <= 0 or bias_penalty <= 0:
        raise ValueError(f"need steps >= 1 and positive penalties, got {steps=}, {penalty=}, {bias_penalty=}")
    embed = model.embed

    def init(key: jax.Array) -> Params:
        log_penalty = {"delta": jnp.log(jnp.float32(penalty))}
        if not faithful:
            log_penalty["bias"] = jnp.log(jnp.float32(bias_penalty))
        return {"model": model.init(key), "log_penalty": log_penalty}

    def inputs(params: Params, features: Features) -> tuple[jax.Array, jax.Array]:
        """Return phi `[users, examples, width]` and f `[users, examples]`."""
        phi = embed(params["model"], features)
        return phi, jnp.zeros(phi.shape[:2], phi.dtype) if faithful else model.apply(params["model"], features)

    def adapt(params: Params, support: Examples, key: jax.Array) -> Head:
        phi, shared = inputs(params, support.features)
        prior = jax.tree.map(jnp.exp, params["log_penalty"])
        prior = {"bias": prior["delta"]} | prior
        users, _, width = phi.shape
        head = {"delta": jnp.zeros((users, width), phi.dtype), "bias": jnp.zeros(users, phi.dtype)}
        for _ in range(steps):
            head = newton_step(head, phi, shared, support, loss, prior)
        return head

    def predict(params: Params, head: Head, features: Features) -> jax.Array:
        return correct(head, *inputs(params, features))

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = predict(params, adapt(params, task.support, key), task.query.features)
        return query_loss(scores, task.query, loss), {}

    return Strategy(init, adapt, predict, meta_loss)


def correct(head: Head, phi: jax.Array, shared: jax.Array) -> jax.Array:
    """Return the corrected score `f + phi.d + b`, `[users, examples]`."""
    return shared + jnp.einsum("unf,uf->un", phi, head["delta"]) + head["bias"][:, None]


def newton_step(
    head: Head, phi: jax.Array, shared: jax.Array, support: Examples, loss: PointwiseLoss, penalty: Head
) -> Head:
    """Take one Newton step of each user's head, by conjugate gradients in the penalised Hessian.

    Args:
      head: current `delta` `[users, width]` and `bias` `[users]`.
      phi: `[users, examples, width]` features.
      shared: `[users, examples]` scores of the shared model.
      support: targets and mask (or weights) `[users, examples]`.
      loss: elementwise, convex.
      penalty: `delta` and `bias`, positive scalars.

    Returns:
      The new head; zeros stay zeros for a user without examples.
    """

    def slope(scores: jax.Array) -> jax.Array:
        return jax.grad(lambda s: loss(s, support.target).sum())(scores)

    scores = correct(head, phi, shared)
    gradient, curvature = jax.jvp(slope, (scores,), (jnp.ones_like(scores),))  # elementwise: the Hessian is diagonal
    keep = support.mask > 0
    gradient, curvature = (jnp.where(keep, support.mask * d, 0.0) for d in (gradient, curvature))
    x = jnp.where(keep[..., None], jnp.concatenate([phi, jnp.ones_like(phi[..., :1])], -1), 0.0)
    at = jnp.concatenate([head["delta"], head["bias"][:, None]], -1)
    prior = jnp.concatenate([jnp.broadcast_to(penalty["delta"], phi.shape[-1:]), penalty["bias"][None]])
    hessian = jnp.einsum("unf,un,ung->ufg", x, curvature, x) + jnp.diag(prior)
    slopes = jnp.einsum("unf,un->uf", x, gradient) + prior * at
    new = at - solve(hessian, slopes, steps=24 + len(prior))  # more than are exact, for rounding
    return {"delta": new[:, :-1], "bias": new[:, -1]}
