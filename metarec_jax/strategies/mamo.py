"""MAMO: memories that users with like profiles share say where the user's inner loop starts."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.models.profile import constant, profile_of
from metarec_jax.strategies.decoder import need_embed
from metarec_jax.strategies.gradient import default_inner
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task


def mamo(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 5,
    learn_step_size: bool = True,
    first_order: bool = False,
    memories: int = 4,
    size: int = 16,
    hidden: int = 32,
    tau: float = 1.0,
    count: float = 0.0,
) -> Strategy:
    """Memory-augmented meta-optimisation: the inner loop of each user starts from what memories say of the profile.

        a_u = softmax_k cos(p_u, M_P[k]);   b_u = a_u . M_U;   theta_u = phi_u - tau b_u;   M_uI = a_u . M_UI
        e_u = relu(theta_u p_u);   score(x) = f(x) + r . relu(M_uI [e_u, phi(x)]) + r_0

    p_u is the user's profile, f the shared model and phi its `embed`. Of a user's own are theta_u (weights and bias),
    the preference matrix M_uI and the head r, which `steps` inner steps on the support adapt. The paper writes its
    memories by hand-made attentive updates; here they are parameters that learn from the meta-gradient. Its item
    embeddings adapt too; here f and phi stay shared.

    Args:
      model: needs `embed` and `width`; without `profile` all users have the same one.
      loss: elementwise loss of scores and targets, inner and outer.
      inner, steps, learn_step_size, first_order, count: the inner loop, as in `maml`.
      memories: how many kinds of users, the rows of each memory.
      size: of e_u.
      hidden: rows of the preference matrix.
      tau: how far the bias term moves the start.

    The loss's aux has `failed`, as in `maml`.

    Raises:
      ValueError: the model lacks `embed` or `width`, or a size is not positive.

    References:
      Dong et al., MAMO: Memory-Augmented Meta-Optimization for Cold-start Recommendation, KDD 2020: the
      feature-specific memories (M_P, M_U) and the task-specific one (M_UI).
    """
    if memories < 1 or size < 1 or hidden < 1:
        raise ValueError(f"memories, size and hidden must be positive, got {memories=}, {size=}, {hidden=}")
    embed, width = need_embed(model)
    inner = default_inner(loss) if inner is None else inner
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
        if learn_step_size:
            params["log_step_size"] = jax.tree.map(lambda _: jnp.zeros(()), own(params))
        return params

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        p = profile_of(encoder, params["encoder"], support)
        user = {"profile": p, "attention": attention(p, params["profile"])}
        fast = core.adapt(
            score,
            {"shared": params, "own": own(params)},
            support._replace(features=given(params, user, support.features)),
            loss=loss,
            optimizer=inner,
            steps=steps,
            adapted={"shared": False, "own": True},
            step_size={"shared": 1.0, "own": jax.tree.map(jnp.exp, params["log_step_size"])}
            if learn_step_size
            else 1.0,
            first_order=first_order,
            count=count,
        )
        return fast, user

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        fast, user = adapted
        return core.predict(score, {"shared": params, "own": own(params)}, fast, given(params, user, features))

    def given(params: Params, user: Params, features: Features) -> Features:
        """What the inner loop reads of each example: the shared model's part is worked out once."""
        phi, shared = embed(params["model"], features), model.apply(params["model"], features)
        spread = {name: jnp.broadcast_to(x[:, None], (*shared.shape, x.shape[-1])) for name, x in user.items()}
        return spread | {"phi": phi, "shared": shared}

    def score(params: Params, features: Features) -> jax.Array:
        """One user's scores. The inner loop starts all users alike, so a user's own start comes with the features and
        what adapts is the change from it."""
        shared, change = params["shared"], params["own"]
        a, p = features["attention"][0], features["profile"]
        start = jax.tree.map(lambda phi, memory: phi - tau * read(a, memory), shared["user"], shared["bias_term"])
        e = jax.nn.relu(p @ start["weight"] + start["bias"] + p @ change["user"]["weight"] + change["user"]["bias"])
        x = jnp.concatenate([e, features["phi"]], -1)
        z = jax.nn.relu(x @ read(a, shared["preference"]) + x @ change["preference"])
        return features["shared"] + z @ change["head"]["weight"] + change["head"]["bias"]

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        fast, user = adapt(params, task.support, key)
        scores = predict(params, (fast, user), task.query.features)
        return core.query_loss(scores, task.query, loss), {"failed": fast.failed.sum()}

    return Strategy(init, adapt, predict, meta_loss)


def own(params: Params) -> Params:
    """Where what adapts starts: changes at zero, and the head."""
    zero = {"user": params["user"], "preference": params["preference"][0]}
    return jax.tree.map(jnp.zeros_like, zero) | {"head": params["head"]}


def attention(profile: jax.Array, memory: jax.Array) -> jax.Array:
    """a_u `[users, memories]`: softmax of the cosines between profiles `[users, width]` and rows of the memory; of the
    products where the profile is one number, of whose cosine only the sign would be left."""
    if profile.shape[-1] == 1:
        return jax.nn.softmax(profile @ memory.T)

    def unit(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-12)

    return jax.nn.softmax(unit(profile) @ unit(memory).T)


def read(a: jax.Array, memory: jax.Array) -> jax.Array:
    """a . M, of a memory `[memories, ...]`."""
    return jnp.tensordot(a, memory, 1)
