"""TaNP: a neural process whose decoder is modulated by the type of user."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import need_embed
from metarec_jax.strategies.networks import dense, matrix, run
from metarec_jax.strategies.process import (
    Normal,
    kl_weight,
    mean,
    normal,
    not_negative,
    pairs,
    positive,
    sample,
    target_loss,
)
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task, masked_mean


def tanp(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    size: int = 32,
    hidden: int = 64,
    layers: int = 2,
    clusters: int = 8,
    alpha: float = 1.0,
    gated: bool = True,
    kl: float | None = None,
    clustering: float = 0.1,
    faithful: bool = False,
) -> Strategy:
    """Task-adaptive neural process: the type of user modulates the layers of the decoder.

        z_u ~ q(z | support) = N(mu, sigma^2)(mean_i h(x_i, y_i));   t_u = mean_i m(x_i, y_i)
        c_uj ~ (1 + |t_u - a_j|^2 / alpha)^(-(alpha + 1) / 2),  sum_j c_uj = 1;   o_u = t_u + sum_j c_uj a_j
        g_0 = [phi(x), z_u];   g_l = relu(gamma_l(o_u) * (W_l g_{l-1} + b_l) + beta_l(o_u));   score(x) = f(x) + v . g
        loss = L_query(z ~ q(z | support and query)) + kl * KL(q(z | support and query) || q(z | support))
               + clustering * KL(d || c),   d_uj ~ c_uj^2 / sum_u c_uj,  sum_j d_uj = 1

    The a_j are learned centroids, f is the shared model and phi its `embed`. d is held constant, as in the clustering
    method it comes from (Xie et al., ICML 2016). Prediction uses the mean of q(z | support).

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      size: width of z, t, o and the centroids.
      hidden: width of hidden layers.
      layers: number of layers of the decoder.
      clusters: number of centroids.
      alpha: degrees of freedom of Student's t.
      gated: Gating-FiLM, else FiLM; see `film`.
      kl, clustering: weights of the two divergences; `kl` as in `anp`.
      faithful: the paper's evidence lower bound, over the number n_u of targets, with `loss` as -log p:
        (sum_{i in support and query} loss_i + KL_u) / n_u + clustering * KL(d || c). The encoders read phi(x) and y
        alone, and score(x) = v . g + v_0, without a shared score. Without support, z_u, t_u and o_u are the encoders'
        values for no examples.

    Raises:
      ValueError: the model lacks `embed` or `width`, a size or `alpha` is not positive, a weight is negative, or
        `faithful` with `kl`.

    Differs from the paper, unless `faithful`:
      - The score of a shared model f is added, and the encoders read it.
      - The likelihood is that of the query set alone, where the paper's targets include the support, and its divergence
        has a fixed weight.

    References:
      Lin et al., Task-adaptive Neural Process for User Cold-Start Recommendation, WWW 2021: encoder, task
      identity network, global pool and adaptive decoder.
    """
    positive(size=size, hidden=hidden, layers=layers, clusters=clusters, alpha=alpha)
    not_negative(clustering=clustering)
    weight = kl_weight(kl, faithful)
    embed, width = need_embed(model)
    inputs, of_targets = width + (1 if faithful else 2), target_loss(loss)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 6)
        widths = [width + size, *[hidden] * layers]
        return {
            "model": model.init(keys[0]),
            "encoder": dense(keys[1], inputs, hidden, size),
            "latent": dense(keys[2], size, hidden, 2 * size),
            "task": dense(keys[3], inputs, hidden, size),
            "centroids": jax.random.normal(keys[4], (clusters, size)) / size**0.5,
            "decoder": [
                film_layer(k, i, o, size, gated)
                for k, (i, o) in zip(jax.random.split(keys[5], layers), pairwise(widths), strict=True)
            ],
            "out": dense(jax.random.fold_in(key, 6), hidden, 1) if faithful else jnp.zeros(hidden),
        }

    def latent(params: Params, xy: jax.Array, mask: jax.Array) -> Normal:
        return normal(params["latent"], mean(run(params["encoder"], xy), mask))

    def task(params: Params, xy: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return o_u `[users, size]` and log c_u `[users, clusters]`."""
        t = mean(run(params["task"], xy), mask)
        log_c = log_assignment(t, params["centroids"], alpha)
        return t + jnp.exp(log_c) @ params["centroids"], log_c

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        xy = pairs(model, params["model"], support, not faithful)
        return {"z": latent(params, xy, support.mask)[0], "task": task(params, xy, support.mask)[0]}

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        phi = embed(params["model"], features)
        z = jnp.broadcast_to(adapted["z"][:, None], (*phi.shape[:2], size))
        g = jnp.concatenate([phi, z], -1)
        for layer in params["decoder"]:
            g = film(layer, g, adapted["task"])
        if faithful:
            return run(params["out"], g)[..., 0]
        return model.apply(params["model"], features) + g @ params["out"]

    def meta_loss(params: Params, batch: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        o, log_c = task(params, pairs(model, params["model"], batch.support, not faithful), batch.support.mask)
        z, divergence = sample(latent, model, params, batch, key, not faithful)
        real = jnp.any(batch.query.mask > 0, axis=1)
        adapted, mean_divergence = {"z": z, "task": o}, masked_mean(divergence, real)
        if faithful:
            fit = of_targets(partial(predict, params, adapted), batch, divergence)
        else:
            fit = query_loss(predict(params, adapted, batch.query.features), batch.query, loss)
            fit += weight * mean_divergence
        grouping = clustering_loss(log_c, real)
        return fit + clustering * grouping, {"kl": mean_divergence, "clustering": grouping}

    return Strategy(init, adapt, predict, meta_loss, contrast=False)


def log_assignment(t: jax.Array, centroids: jax.Array, alpha: float) -> jax.Array:
    """Return log c `[users, clusters]`: the normalised Student's t kernel of the distances to the centroids."""
    distance = ((t[:, None] - centroids) ** 2).sum(-1)
    return jax.nn.log_softmax(-(alpha + 1) / 2 * jnp.log1p(distance / alpha))


def clustering_loss(log_c: jax.Array, real: jax.Array) -> jax.Array:
    """Return the mean of KL(d || c) over real users; d is the sharpened assignment, normalised by cluster frequency."""
    frequency = jnp.where(real[:, None], jnp.exp(log_c), 0.0).sum(0)
    log_d = jax.lax.stop_gradient(jax.nn.log_softmax(2 * log_c - jnp.log(jnp.maximum(frequency, 1e-30))))
    return masked_mean((jnp.exp(log_d) * (log_d - log_c)).sum(-1), real)


def film_layer(key: jax.Array, width: int, out: int, size: int, gated: bool) -> Params:
    """Return the parameters of `film`."""
    names = ("gamma", "beta", "eta", "delta") if gated else ("gamma", "beta")
    keys = jax.random.split(key, len(names) + 1)
    (layer,) = dense(keys[0], width, out)
    return layer | {n: matrix(k, size, out) for n, k in zip(names, keys[1:], strict=True)}


def film(layer: Params, g: jax.Array, o: jax.Array) -> jax.Array:
    """Apply a layer on `[users, examples, width]` that a task embedding o `[users, size]` modulates.

        relu(gamma * (W g + b) + beta),   gamma = tanh(W_gamma o),  beta = tanh(W_beta o)

    Gating-FiLM has also eta = tanh(W_eta o) and delta = sigmoid(W_delta o), and replaces gamma and beta by the mixtures
    delta * gamma + (1 - delta) * eta and delta * beta + (1 - delta) * eta.
    """
    o = o[:, None]
    gamma, beta = jnp.tanh(o @ layer["gamma"]), jnp.tanh(o @ layer["beta"])
    if "eta" in layer:
        eta, delta = jnp.tanh(o @ layer["eta"]), jax.nn.sigmoid(o @ layer["delta"])
        gamma, beta = (delta * x + (1 - delta) * eta for x in (gamma, beta))
    return jax.nn.relu(gamma * (g @ layer["weight"] + layer["bias"]) + beta)
