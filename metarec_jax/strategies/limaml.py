"""LiMAML: a small block is adapted to each user, and only its output, a short vector, is stored."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.models.profile import constant, profile_of
from metarec_jax.strategies.decoder import reader, score_one
from metarec_jax.strategies.gradient import default_inner, learns_step_size
from metarec_jax.strategies.networks import matrix
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task


def limaml(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    size: int = 16,
    hidden: int = 32,
    learn_step_size: bool | None = None,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """A meta block adapted as in MAML, whose fixed-size output a global network shared by all users reads.

        phi_u = phi after `steps` inner steps;   e_u = block(phi_u, profile_u);   score(x) = f(theta, e_u, x)

    The block is a two-layer network on the user's attributes; f is `decoder`. theta and phi are trained together on the
    query loss, through the inner steps. `adapt` returns e_u alone, so that users' embeddings can be computed ahead,
    stored, and refreshed when new clicks arrive.

    Args:
      model: needs `embed` and `width`; the block reads its `profile` (a constant if it has none).
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser, any optax transformation (default SGD with 0.0625 over the loss's curvature).
      steps: inner steps.
      size: width of the meta embedding.
      hidden: width of the block's hidden layer.
      learn_step_size: meta-learn one factor per array of the block, which multiplies the inner optimiser's updates;
        None: unless `faithful`.
      count: see `maml`.
      faithful: read e_u as an additional input of the global network, score(x) = v . relu(W [phi(x), e_u] + b) + b_0,
        without a shared score, and fix the step size, as in section 3 of the paper. A user without support has the
        block's output before adaptation.

    The aux of the loss has `failed`: how many users met a non-finite number in the inner loop and were not adapted.

    Raises:
      ValueError: the model lacks `embed` or `width`; `steps`, `size` or `hidden` is less than 1; or `faithful` with a
        learned step size or a `count`.

    Differs from the paper:
      - The block reads the user's attributes only; in the paper its input features are chosen by the application.
      - The embedding corrects the shared model's scores through `decoder`; in the paper it is an additional input of
        the global network (`faithful=True`).
      - Step sizes are meta-learned by default, and fixed in the paper (`faithful=True`).

    References:
      Wang et al., LiMAML: Personalization of Deep Recommender Models via Meta Learning, KDD 2024, section 3.
    """
    if steps < 1 or size < 1 or hidden < 1:
        raise ValueError(f"steps, size and hidden must be 1 or more, got {steps=}, {size=}, {hidden=}")
    inner = default_inner(loss, 0.0625) if inner is None else inner
    network, profile = reader(model, size, faithful=faithful), model.profile or constant()
    learns = learns_step_size(faithful, learn_step_size, count)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 4)
        block = {
            "w1": matrix(keys[0], profile.width, hidden),
            "b1": jnp.zeros(hidden),
            "w2": 0.1 * matrix(keys[1], hidden, size),
            "b2": jnp.zeros(size),
        }
        params = {"block": block, "network": network.init(keys[2]), "profile": profile.init(keys[3])}
        return params | {"log_step_size": jax.tree.map(lambda _: jnp.zeros(()), block)} if learns else params

    def solve(params: Params, support: Examples) -> tuple[jax.Array, jax.Array]:
        attributes = profile_of(profile, params["profile"], support)

        def one_user(params: Params, features: Features) -> jax.Array:
            attributes, features = features
            return score_one(network, params["network"], block(params["block"], attributes), features)

        shared = {"block": params["block"], "network": params["network"]}
        adapted = core.adapt(
            one_user,
            shared,
            support._replace(features=(attributes, support.features)),
            loss=loss,
            optimizer=inner,
            steps=steps,
            adapted={"block": True, "network": False},
            step_size={"block": jax.tree.map(jnp.exp, params["log_step_size"]), "network": None} if learns else 1.0,
            count=count,
            form="plain",  # the block is small; with low-rank fast weights every step would be compiled separately
        )
        embedding = core.predict(lambda params, x: block(params["block"], x), shared, adapted, attributes)
        return embedding, adapted.failed

    def adapt(params: Params, support: Examples, key: jax.Array) -> jax.Array:
        return solve(params, support)[0]

    def predict(params: Params, embedding: jax.Array, features: Features) -> jax.Array:
        return network.apply(params["network"], embedding, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        embedding, failed = solve(params, task.support)
        scores = predict(params, embedding, task.query.features)
        return core.query_loss(scores, task.query, loss), {"failed": failed.sum()}

    return Strategy(init, adapt, predict, meta_loss)


def block(params: Params, profile: jax.Array) -> jax.Array:
    """Return the meta embedding `[size]` of one user's profile `[width]`."""
    return jnp.tanh(profile @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
