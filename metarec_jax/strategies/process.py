"""Neural processes (CNP, ANP, TaNP): a network reads the support set and predicts in one pass, with no inner loop."""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import decoder, need_embed
from metarec_jax.strategies.networks import dense, run
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task, masked_mean, normal_per_user

Normal = tuple[jax.Array, jax.Array]  # mean and standard deviation, `[users, size]`


def cnp(
    model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, size: int = 32, hidden: int = 64
) -> Strategy:
    """Conditional neural process: a user is the mean encoding of their examples.

        r_u = mean_{i in support} h(x_i, y_i);   score(x) = g(x, r_u)

    h reads `embed` and the shared score of x_i next to y_i; g is `decoder`. Without support, the score is that of the
    shared model.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      size: width of r_u.
      hidden: width of the encoder's hidden layers.

    Raises:
      ValueError: the model lacks `embed` or `width`, or a size is not positive.

    Differs from the paper:
      - g returns the score of `loss`; the paper's g returns a mean and a variance.
      - g corrects the score of a shared model, and h reads that score.

    References:
      Garnelo et al., Conditional Neural Processes, ICML 2018, equations 1 to 3.
    """
    _positive(size=size, hidden=hidden)
    _, width = need_embed(model)
    score = decoder(model, size, hidden)

    def init(key: jax.Array) -> Params:
        a, b = jax.random.split(key)
        return score.init(a) | {"encoder": dense(b, width + 2, hidden, hidden, size)}

    def adapt(params: Params, support: Examples, key: jax.Array) -> jax.Array:
        return mean(run(params["encoder"], pairs(model, params["model"], support)), support.mask)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = score.apply(params, adapt(params, task.support, key), task.query.features)
        return query_loss(scores, task.query, loss), {}

    return Strategy(init, adapt, score.apply, meta_loss, contrast=False)


def anp(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    size: int = 32,
    hidden: int = 64,
    heads: int = 4,
    kl: float = 0.1,
) -> Strategy:
    """Attentive neural process: each example to score attends to similar support examples.

        s_i = h(x_i, y_i);   r_i = s_i + attend(s_i, s, s);   r(x) = attend(k(x), k(x_support), r_support)
        z_u ~ q(z | support) = N(mu, sigma^2)(mean_i r'_i);   score(x) = g(x, [r(x), z_u])
        loss = L_query(z ~ q(z | support and query)) + kl * KL(q(z | support and query) || q(z | support))

    attend is multi-head attention, with a residual in the encoders; r' is the encoder of the latent path and g is
    `decoder`. Prediction uses the mean of q(z | support).

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      size: width of r and of z.
      hidden: width of hidden layers.
      heads: number of heads of each attention; divides `size`.
      kl: weight of the divergence. The paper's bound sums losses over the targets, while `loss` takes their mean: the
        default is the paper's weight for ten query examples.

    Raises:
      ValueError: the model lacks `embed` or `width`, a size is not positive, or `kl` is negative.

    Differs from the paper:
      - The likelihood is that of the query set alone; the paper's targets include the support.
      - g returns the score of `loss`, as a correction of a shared model's score, which the encoders read too.

    References:
      Kim et al., Attentive Neural Processes, ICLR 2019, sections 2 and 3.
    """
    _positive(size=size, hidden=hidden, heads=heads)
    _not_negative(kl=kl)
    if size % heads:
        raise ValueError(f"size must be a multiple of heads, got {size=}, {heads=}")
    embed, width = need_embed(model)
    score = decoder(model, 2 * size, hidden)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 8)
        return score.init(keys[0]) | {
            "encoder": dense(keys[1], width + 2, hidden, size),
            "self": attention(keys[2], size),
            "key": dense(keys[3], width, hidden, size),
            "cross": attention(keys[4], size),
            "latent_encoder": dense(keys[5], width + 2, hidden, size),
            "latent_self": attention(keys[6], size),
            "latent": dense(keys[7], size, hidden, 2 * size),
        }

    def encode(params: Params, path: str, xy: jax.Array, mask: jax.Array) -> jax.Array:
        s = run(params[path + "encoder"], xy)
        return s + attend(params[path + "self"], s, s, s, mask, heads)

    def latent(params: Params, xy: jax.Array, mask: jax.Array) -> Normal:
        return normal(params["latent"], mean(encode(params, "latent_", xy, mask), mask))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        xy = pairs(model, params["model"], support)
        return {
            "key": run(params["key"], xy[..., :width]),
            "value": encode(params, "", xy, support.mask),
            "mask": support.mask,
            "z": latent(params, xy, support.mask)[0],
        }

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        query = run(params["key"], embed(params["model"], features))
        r = attend(params["cross"], query, adapted["key"], adapted["value"], adapted["mask"], heads)
        z = jnp.broadcast_to(adapted["z"][:, None], r.shape)
        return score.apply(params, jnp.concatenate([r, z], -1), features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        adapted = adapt(params, task.support, key)
        z, divergence = sample(latent, model, params, task, key)
        scores = predict(params, adapted | {"z": z}, task.query.features)
        return query_loss(scores, task.query, loss) + kl * divergence, {"kl": divergence}

    return Strategy(init, adapt, predict, meta_loss, contrast=False)


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
    kl: float = 0.1,
    clustering: float = 0.1,
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

    Raises:
      ValueError: the model lacks `embed` or `width`, a size or `alpha` is not positive, or a weight is negative.

    Differs from the paper:
      - The score of a shared model f is added, and the encoders read it.
      - The likelihood is that of the query set alone; the paper's targets include the support.

    References:
      Lin et al., Task-adaptive Neural Process for User Cold-Start Recommendation, WWW 2021: encoder, task
      identity network, global pool and adaptive decoder.
    """
    _positive(size=size, hidden=hidden, layers=layers, clusters=clusters, alpha=alpha)
    _not_negative(kl=kl, clustering=clustering)
    embed, width = need_embed(model)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 6)
        widths = [width + size, *[hidden] * layers]
        return {
            "model": model.init(keys[0]),
            "encoder": dense(keys[1], width + 2, hidden, size),
            "latent": dense(keys[2], size, hidden, 2 * size),
            "task": dense(keys[3], width + 2, hidden, size),
            "centroids": jax.random.normal(keys[4], (clusters, size)) / size**0.5,
            "decoder": [
                film_layer(k, i, o, size, gated)
                for k, (i, o) in zip(jax.random.split(keys[5], layers), pairwise(widths), strict=True)
            ],
            "out": jnp.zeros(hidden),
        }

    def latent(params: Params, xy: jax.Array, mask: jax.Array) -> Normal:
        return normal(params["latent"], mean(run(params["encoder"], xy), mask))

    def task(params: Params, xy: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return o_u `[users, size]` and log c_u `[users, clusters]`."""
        t = mean(run(params["task"], xy), mask)
        log_c = log_assignment(t, params["centroids"], alpha)
        return t + jnp.exp(log_c) @ params["centroids"], log_c

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        xy = pairs(model, params["model"], support)
        return {"z": latent(params, xy, support.mask)[0], "task": task(params, xy, support.mask)[0]}

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        phi = embed(params["model"], features)
        z = jnp.broadcast_to(adapted["z"][:, None], (*phi.shape[:2], size))
        g = jnp.concatenate([phi, z], -1)
        for layer in params["decoder"]:
            g = film(layer, g, adapted["task"])
        return model.apply(params["model"], features) + g @ params["out"]

    def meta_loss(params: Params, batch: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        o, log_c = task(params, pairs(model, params["model"], batch.support), batch.support.mask)
        z, divergence = sample(latent, model, params, batch, key)
        fit = query_loss(predict(params, {"z": z, "task": o}, batch.query.features), batch.query, loss)
        grouping = clustering_loss(log_c, jnp.any(batch.query.mask > 0, axis=1))
        return fit + kl * divergence + clustering * grouping, {"kl": divergence, "clustering": grouping}

    return Strategy(init, adapt, predict, meta_loss, contrast=False)


def pairs(model: Model, params: Params, examples: Examples) -> jax.Array:
    """Return the encoders' input for each example: `[embed, shared score, target]`, `[users, examples, width + 2]`."""
    embed, _ = need_embed(model)
    score, target = model.apply(params, examples.features), examples.target
    both = jnp.concatenate([embed(params, examples.features), score[..., None], target[..., None]], -1)
    return jnp.where(examples.mask[..., None] > 0, both, 0.0)


def mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean over each user's real examples, `[users, width]`; 0 without any."""
    return jax.vmap(jax.vmap(masked_mean, (1, None)))(values, mask)


def attention(key: jax.Array, size: int) -> Params:
    """Return the parameters of `attend`: four projections."""
    names = ("query", "key", "value", "out")
    keys = jax.random.split(key, len(names))
    return {name: jax.random.normal(k, (size, size)) / size**0.5 for name, k in zip(names, keys, strict=True)}


def attend(
    params: Params, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, heads: int
) -> jax.Array:
    """Scaled dot-product attention with several heads (Vaswani et al., 2017).

    Args:
      params: projections made by `attention`.
      query: `[users, n, size]`.
      key, value: `[users, m, size]`.
      mask: `[users, m]`; a positive number is the weight of an example, 0 is padding.
      heads: number of heads; divides `size`.

    Returns:
      `[users, n, size]`; zeros for users without real examples.
    """

    def project(name: str, x: jax.Array) -> jax.Array:
        return (x @ params[name]).reshape(*x.shape[:2], heads, -1)

    real = mask[:, None, None] > 0
    weight = jnp.log(jnp.where(real, mask[:, None, None], 1.0))
    attended = jax.nn.dot_product_attention(
        project("query", query), project("key", key), project("value", value), weight, real
    ).reshape(query.shape)
    return jnp.where(jnp.any(real, -1), attended, 0.0) @ params["out"]


def normal(params: Params, r: jax.Array) -> Normal:
    """Return q(z | r). Its standard deviation stays between 0.1 and 1, so that no divergence can blow up."""
    mu, raw = jnp.split(run(params, jax.nn.relu(r)), 2, -1)
    return mu, 0.1 + 0.9 * jax.nn.sigmoid(raw)


def kl_divergence(q: Normal, p: Normal) -> jax.Array:
    """Return KL(q || p) of diagonal normal distributions, `[users]`."""
    (m, s), (n, t) = q, p
    return (jnp.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum(-1)


def sample(
    latent: Callable[..., Normal], model: Model, params: Params, task: Task, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw z `[users, size]` from q(z | support and query); also return the mean divergence to q(z | support)."""
    sets = [(pairs(model, params["model"], part), part.mask) for part in task]
    prior = latent(params, *sets[0])
    mu, sigma = latent(params, *(jnp.concatenate(parts, 1) for parts in zip(*sets, strict=True)))
    divergence = kl_divergence((mu, sigma), prior)
    z = mu + sigma * normal_per_user(key, len(mu), mu.shape[1:])
    return z, masked_mean(divergence, jnp.any(task.query.mask > 0, axis=1))


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
    return layer | {n: jax.random.normal(k, (size, out)) / size**0.5 for n, k in zip(names, keys[1:], strict=True)}


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


def _positive(**options: float) -> None:
    if bad := [f"{name}={value}" for name, value in options.items() if value <= 0]:
        raise ValueError(f"must be positive: {', '.join(bad)}")


def _not_negative(**options: float) -> None:
    if bad := [f"{name}={value}" for name, value in options.items() if value < 0]:
        raise ValueError(f"must not be negative: {', '.join(bad)}")
