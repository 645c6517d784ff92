"""CAVIA: each user is a short context vector, found by a few gradient steps from zero; all weights are shared."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import adapt_context, reader
from metarec_jax.strategies.gradient import default_inner, learns_step_size
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task


def cavia(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    size: int = 16,
    learn_step_size: bool | None = None,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """Fast context adaptation: inner steps move only a context vector, which starts at zero for every user.

        c_0 = 0;   c_{k+1} = c_k - alpha * grad_c L_support(c_k, theta);   score(x) = decoder(theta, c_u, x)

    theta, the model and the decoder that reads c, is trained through the inner steps. A user is stored as `size`
    numbers.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default SGD with 0.0625 over the loss's curvature).
      steps: inner steps.
      size: width of the context vector.
      learn_step_size: meta-learn one factor that multiplies the inner optimiser's updates; None: unless `faithful`.
      count: see `maml`.
      faithful: read c as an additional input of one layer, score(x) = v . relu(W [phi(x), c] + b) + b_0, without a
        shared score, and fix the step size alpha, as in the paper's inner update. A user without support has c = 0.

    The aux of the loss has `failed`: how many users met a non-finite number in the inner loop and kept the zero
    context.

    Raises:
      ValueError: the model lacks `embed` or `width`; `steps` or `size` is less than 1; or `faithful` with a learned
        step size or a `count`.

    Differs from the paper:
      - The context acts through `decoder`; in the paper it is an additional input of a layer (`faithful=True`).
      - The step size is meta-learned by default, and fixed in the paper (`faithful=True`).

    References:
      Zintgraf et al., Fast Context Adaptation via Meta-Learning, ICML 2019, eq. 4 and 5.
    """
    if steps < 1 or size < 1:
        raise ValueError(f"need steps >= 1 and size >= 1, got {steps=}, {size=}")
    inner = default_inner(loss, 0.0625) if inner is None else inner
    network = reader(model, size, faithful=faithful)
    learns = learns_step_size(faithful, learn_step_size, count)

    def init(key: jax.Array) -> Params:
        params = {"network": network.init(key)}
        return params | {"log_step_size": jnp.zeros(())} if learns else params

    def solve(params: Params, support: Examples) -> tuple[jax.Array, jax.Array]:
        start = jnp.zeros((support.mask.shape[0], size))
        step_size = jnp.exp(params["log_step_size"]) if learns else 1.0
        options = {"loss": loss, "optimizer": inner, "steps": steps, "step_size": step_size, "count": count}
        return adapt_context(network, params["network"], start, support, **options)

    def adapt(params: Params, support: Examples, key: jax.Array) -> jax.Array:
        return solve(params, support)[0]

    def predict(params: Params, context: jax.Array, features: Features) -> jax.Array:
        return network.apply(params["network"], context, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        context, failed = solve(params, task.support)
        scores = predict(params, context, task.query.features)
        return query_loss(scores, task.query, loss), {"failed": failed.sum()}

    return Strategy(init, adapt, predict, meta_loss)
