"""MAMO: each user's inner loop starts from memories that users with similar profiles share."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.models.profile import constant, profile_of
from metarec_jax.strategies.decoder import need_embed
from metarec_jax.strategies.gradient import default_inner, learns_step_size
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task, mean_loss

MEMORIES = ("profile", "bias_term", "preference")  # M_P, M_U and M_UI


def mamo(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool | None = None,
    first_order: bool = False,
    memories: int = 4,
    size: int = 16,
    hidden: int = 32,
    tau: float = 1.0,
    count: float = 0.0,
    faithful: bool = False,
) -> Strategy:
    """Memory-augmented meta-optimisation: the profile reads each user's initial weights from shared memories.

        a_u = softmax_k cos(p_u, M_P[k]);   b_u = a_u . M_U;   theta_u = phi_u - tau b_u;   M_uI = a_u . M_UI
        e_u = relu(theta_u p_u);   score(x) = f(x) + r . relu(M_uI [e_u, phi(x)]) + r_0

    p_u is the user's profile, f the shared model and phi its `embed`. `steps` inner steps on the support adapt theta_u
    (weights and bias), the preference matrix M_uI and the head (r, r_0).

    Args:
      model: needs `embed` and `width`; without `profile` all users have the same one.
      loss: elementwise loss of scores and targets, inner and outer.
      inner, steps, learn_step_size, first_order, count: the inner loop, as in `maml`.
      memories: number of rows of each memory, one for each kind of user.
      size: width of e_u.
      hidden: rows of the preference matrix.
      tau: factor of the bias term b_u in the initial weights.
      faithful: leave f out, fix the step sizes, and write the memories by attention instead of training them, as in the
        paper's updates, see below. Without support, the score is that of the user's initial weights.

    The attentive writes, for one user:

        M_P <- alpha a_u p_u' + (1 - alpha) M_P,   M_U <- beta a_u (dL_support / dtheta_u)' + (1 - beta) M_U
        M_UI <- gamma a_u M_uI + (1 - gamma) M_UI

    with the gradient at the initial weights and M_uI after the inner steps. A batch writes the mean over its users. The
    writes are gradients of the memories, so the outer optimiser sets alpha, beta and gamma: with `optax.sgd(0.1)` they
    are 0.1; Adam follows their direction.

    The aux of the loss has `failed`, as in `maml`.

    Raises:
      ValueError: the model lacks `embed` or `width`, a size is not positive, or `faithful` with a learned step size or
        a `count`.

    Differs from the paper:
      - Unless `faithful`, there is no attentive memory write: the memories are parameters trained by the meta-gradient.
      - Unless `faithful`, the score of a shared model f is added and step sizes are meta-learned.
      - phi is not adapted; the paper adapts item embeddings too.
      - If the profile is a single number, attention uses the product instead of the cosine.

    References:
      Dong et al., MAMO: Memory-Augmented Meta-Optimization for Cold-start Recommendation, KDD 2020: the
      feature-specific memories (M_P, M_U) and the task-specific one (M_UI).
    """
    if memories < 1 or size < 1 or hidden < 1:
        raise ValueError(f"memories, size and hidden must be positive, got {memories=}, {size=}, {hidden=}")
    embed, width = need_embed(model)
    inner = default_inner(loss) if inner is None else inner
    learns = learns_step_size(faithful, learn_step_size, count)
    encoder = constant() if model.profile is None else model.profile

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 7)
        normal = jax.random.normal
        params = {
            "model": model.init(keys[0]),
            "encoder": encoder.init(keys[1]),
            "profile": normal(keys[2], (memories, encoder.width)),
            "user": {"weight": normal(keys[3], (encoder.width, size)) / encoder.width**0.5, "bias": jnp.zeros(size)},
            "bias_term": {
                "weight": 0.05 * normal(keys[4], (memories, encoder.width, size)),
                "bias": jnp.zeros((memories, size)),
            },
            "preference": normal(keys[5], (memories, size + width, hidden)) / (size + width) ** 0.5,
            "head": {"weight": 0.1 * normal(keys[6], (hidden,)), "bias": jnp.zeros(())},
        }
        if learns:
            params["log_step_size"] = jax.tree.map(lambda _: jnp.zeros(()), own(params))
        return params

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        p = profile_of(encoder, params["encoder"], support)
        user = {"profile": p, "attention": attention(p, params["profile"])}
        fast = core.adapt(
            score,
            {"shared": params, "own": own(params)},
            support._replace(features=inner_features(params, user, support.features)),
            loss=loss,
            optimizer=inner,
            steps=steps,
            adapted={"shared": False, "own": True},
            step_size={"shared": 1.0, "own": jax.tree.map(jnp.exp, params["log_step_size"])} if learns else 1.0,
            first_order=first_order,
            count=count,
        )
        return fast, user

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        fast, user = adapted
        return core.predict(score, {"shared": params, "own": own(params)}, fast, inner_features(params, user, features))

    def inner_features(params: Params, user: Params, features: Features) -> Features:
        """Return the features that the inner loop reads; the shared model is evaluated once, outside the loop."""
        phi = embed(params["model"], features)
        shared = jnp.zeros(phi.shape[:2]) if faithful else model.apply(params["model"], features)
        repeated = {name: jnp.broadcast_to(x[:, None], (*shared.shape, x.shape[-1])) for name, x in user.items()}
        return repeated | {"phi": phi, "shared": shared}

    def score(params: Params, features: Features) -> jax.Array:
        """Score one user's examples.

        The inner loop starts from the same values for all users. Each user's initial weights are therefore part of the
        features, and the adapted parameters are the change from them.
        """
        shared, delta = params["shared"], params["own"]
        a, p = features["attention"][0], features["profile"]
        start = jax.tree.map(lambda phi, memory: phi - tau * read(a, memory), shared["user"], shared["bias_term"])
        e = jax.nn.relu(p @ start["weight"] + start["bias"] + p @ delta["user"]["weight"] + delta["user"]["bias"])
        x = jnp.concatenate([e, features["phi"]], -1)
        z = jax.nn.relu(x @ read(a, shared["preference"]) + x @ delta["preference"])
        return features["shared"] + z @ delta["head"]["weight"] + delta["head"]["bias"]

    def written(params: Params, task: Task, fast: core.fastweights.Adapted, user: Params) -> Params:
        """Return the mean over users of what each writes to the memories."""
        real = jnp.any(task.query.mask > 0, axis=1)
        share = user["attention"] * (real / jnp.maximum(real.sum(), 1))[:, None]
        examples = task.support._replace(features=inner_features(params, user, task.support.features))
        start = own(params)

        def support_loss(change: Params, examples: Examples) -> jax.Array:
            scores = score({"shared": params, "own": start | {"user": change}}, examples.features)
            return mean_loss(loss, scores, examples)

        slope = jax.vmap(jax.grad(support_loss), (None, 0))(start["user"], examples)
        change = core.weights({"shared": params, "own": start}, fast)["own"]["preference"]
        preference = jax.vmap(read, (0, None))(user["attention"], params["preference"])
        values = {"profile": user["profile"], "bias_term": slope, "preference": preference + change}
        return jax.tree.map(lambda x: jnp.tensordot(share.T, x, 1), values)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        memories = {name: params[name] for name in MEMORIES}
        constants = params | jax.lax.stop_gradient(memories) if faithful else params
        fast, user = adapt(constants, task.support, key)
        scores = predict(constants, (fast, user), task.query.features)
        value, aux = core.query_loss(scores, task.query, loss), {"failed": fast.failed.sum()}
        if not faithful:
            return value, aux
        # <M, M - write> with M - write held constant: its gradient in M is that difference
        change = jax.tree.map(jnp.subtract, memories, written(constants, task, fast, user))
        products = jax.tree.map(jnp.vdot, memories, jax.lax.stop_gradient(change))
        surrogate = sum(jax.tree.leaves(products)) * jnp.any(task.query.mask > 0)
        return value + surrogate - jax.lax.stop_gradient(surrogate), aux

    return Strategy(init, adapt, predict, meta_loss, outer="own" if faithful else "query")


def own(params: Params) -> Params:
    """Return the initial adapted parameters: changes at zero, and the head."""
    zero = {"user": params["user"], "preference": params["preference"][0]}
    return jax.tree.map(jnp.zeros_like, zero) | {"head": params["head"]}


def attention(profile: jax.Array, memory: jax.Array) -> jax.Array:
    """Return a_u `[users, memories]`: softmax of the cosines between profiles `[users, width]` and memory rows.

    If the profile is a single number, the softmax is over products: a cosine would keep only its sign.
    """
    if profile.shape[-1] == 1:
        return jax.nn.softmax(profile @ memory.T)

    def unit(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-12)

    return jax.nn.softmax(unit(profile) @ unit(memory).T)


def read(a: jax.Array, memory: jax.Array) -> jax.Array:
    """Return a . M for a memory `[memories, ...]`."""
    return jnp.tensordot(a, memory, 1)
