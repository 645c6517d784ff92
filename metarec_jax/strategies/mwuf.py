"""MWUF: a common initial ID embedding for new tasks, scaled by attributes and shifted by interactions."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.models.profile import constant, profile_of
from metarec_jax.strategies.cold_items import check
from metarec_jax.strategies.decoder import adapt_context, decoder, need_embed
from metarec_jax.strategies.gradient import default_inner
from metarec_jax.strategies.networks import matrix
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task, masked_mean


def mwuf(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 1,
    size: int = 32,
    hidden: int = 16,
    count: float = 0.0,
) -> Strategy:
    """Meta warm-up: a cold embedding is scaled by a network of the attributes z and shifted by one of the interactions.

        e_1 = e - a dL_support(e) / de,   warm embedding = (1 + scale(z)) * e_1 + shift(mean_i phi_i, mean_i y_i phi_i)

    e is shared by all new tasks and phi is the model's `embed` of the support's interactions; scale and shift are
    networks with one hidden layer. The warm embedding is read through `decoder`.

    Args:
      model, loss, inner, steps, size, count: see `metarec_jax.metaemb`.
      hidden: width of the hidden layers.

    Raises:
      ValueError: as `metarec_jax.metaemb`.

    Differs from the paper:
      - There are no pre-trained embeddings: e is a learned parameter, where the paper takes the mean of the trained ID
        embeddings. The model is trained together with e, scale and shift.
      - There is a single loss, that of the warm embedding.
      - The shift also reads the mean of phi_i weighted by the target y_i, because an interaction may be negative
        evidence.
      - The step size a is learned.
      - There is no `faithful` form: the paper trains in stages, and its training tasks have ID embeddings of their own.

    References:
      Zhu et al., Learning to Warm Up Cold Item Embeddings for Cold-start Recommendation with Meta Scaling and Shifting
      Networks, SIGIR 2021.
    """
    check(steps, size, 0.0)
    if hidden < 1:
        raise ValueError(f"hidden must be 1 or more, got {hidden}")
    (embed, width), score, encoder = need_embed(model), decoder(model, size), model.profile or constant()
    inner = default_inner(loss) if inner is None else inner

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 5)
        return {
            "decoder": score.init(keys[0]),
            "profile": encoder.init(keys[1]),
            "common": 0.1 * jax.random.normal(keys[2], (size,)),
            "scale": perceptron(keys[3], encoder.width, hidden, size),
            "shift": perceptron(keys[4], 2 * width, hidden, size),
            "log_step_size": jnp.zeros(()),
        }

    def warm(params: Params, support: Examples) -> tuple[jax.Array, jax.Array]:
        start = jnp.broadcast_to(params["common"], (support.mask.shape[0], size))
        options = {"loss": loss, "optimizer": inner, "steps": steps, "count": count}
        options |= {"step_size": jnp.exp(params["log_step_size"])}
        cold, failed = adapt_context(score, params["decoder"], start, support, **options)
        keep = support.mask > 0
        phi = jnp.where(keep[..., None], embed(params["decoder"]["model"], support.features), 0.0)
        evidence = jnp.concatenate([phi, jnp.where(keep, support.target, 0.0)[..., None] * phi], -1)
        interacted = jax.vmap(jax.vmap(masked_mean, (1, None)))(evidence, support.mask)
        scale = 1 + run(params["scale"], profile_of(encoder, params["profile"], support))
        return scale * cold + run(params["shift"], interacted), failed

    def adapt(params: Params, support: Examples, key: jax.Array) -> jax.Array:
        return warm(params, support)[0]

    def predict(params: Params, embedding: jax.Array, features: Features) -> jax.Array:
        return score.apply(params["decoder"], embedding, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        embedding, failed = warm(params, task.support)
        scores = predict(params, embedding, task.query.features)
        return core.query_loss(scores, task.query, loss), {"failed": failed.sum()}

    return Strategy(init, adapt, predict, meta_loss)


def perceptron(key: jax.Array, inputs: int, hidden: int, outputs: int) -> Params:
    """Return the parameters of a network with one hidden layer, whose outputs start small."""
    a, b = jax.random.split(key)
    return {"in": matrix(a, inputs, hidden), "bias": jnp.zeros(hidden), "out": 0.1 * matrix(b, hidden, outputs)}


def run(params: Params, x: jax.Array) -> jax.Array:
    """Apply the network of `perceptron` to `[..., inputs]`."""
    return jax.nn.relu(x @ params["in"] + params["bias"]) @ params["out"]
