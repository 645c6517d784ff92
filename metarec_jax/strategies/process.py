"""Neural processes (CNP, ANP): a network reads the support set and predicts in one pass, with no inner loop."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import need_embed, reader
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.networks import dense, matrix, run
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task, masked_mean, mean_loss, normal_per_user

KL = 0.1  # default weight of the divergence: that of the paper's bound for ten query examples

Normal = tuple[jax.Array, jax.Array]  # mean and standard deviation, `[users, size]`


def cnp(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    size: int = 32,
    hidden: int = 64,
    faithful: bool = False,
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
      faithful: g is a network on [phi(x), r_u] and h reads phi(x) and y alone, without a shared score; the loss has the
        support among its targets, as in equation 4 of the paper. Without support, the score is g(x, 0).

    Raises:
      ValueError: the model lacks `embed` or `width`, or a size is not positive.

    Differs from the paper:
      - g returns the score of `loss`; the paper's g returns a mean and a variance.
      - Unless `faithful`: g corrects the score of a shared model, and h reads that score; the loss is that of the query
        set, where the paper predicts the support too.

    Example:
      >>> model = mr.Model(init=lambda key: jnp.ones(2), apply=lambda w, x: x @ w, embed=lambda w, x: x, width=2)
      >>> strategy = mr.cnp(model, size=4, hidden=8)
      >>> params, items = jax.jit(strategy.init)(jax.random.key(0)), jnp.eye(2)[None]  # [users, examples, width]
      >>> support = mr.Examples(items[:, :1], jnp.array([[2.0]]), jnp.ones((1, 1)))
      >>> jax.jit(strategy.adapt)(params, support, jax.random.key(1)).shape  # r_u
      (1, 4)
      >>> jax.jit(strategy.predict)(params, jnp.zeros((1, 4)), items)  # without support, the score of the shared model
      Array([[1., 1.]], dtype=float32)

    References:
      Garnelo et al., Conditional Neural Processes, ICML 2018, equations 1 to 3.
    """
    positive(size=size, hidden=hidden)
    _, width = need_embed(model)
    score = reader(model, size, hidden, faithful=faithful)
    inputs, of_targets = width + (1 if faithful else 2), target_loss(loss)

    def init(key: jax.Array) -> Params:
        a, b = jax.random.split(key)
        return score.init(a) | {"encoder": dense(b, inputs, hidden, hidden, size)}

    def adapt(params: Params, support: Examples, key: jax.Array) -> jax.Array:
        return mean(run(params["encoder"], pairs(model, params["model"], support, not faithful)), support.mask)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        r = adapt(params, task.support, key)
        if faithful:
            return of_targets(partial(score.apply, params, r), task), {}
        return query_loss(score.apply(params, r, task.query.features), task.query, loss), {}

    return Strategy(init, adapt, score.apply, meta_loss, contrast=False)


def anp(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    size: int = 32,
    hidden: int = 64,
    heads: int = 4,
    kl: float | None = None,
    faithful: bool = False,
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
      kl: weight of the divergence, 0.1 by default. The paper's bound sums losses over the targets, while `loss` takes
        their mean: the default is the paper's weight for ten query examples. Not with `faithful`.
      faithful: the evidence lower bound of equation 3 of the paper, over the number n_u of targets, with `loss` as
        -log p:  (sum_{i in support and query} loss_i + KL_u) / n_u. g is a network on [phi(x), r(x), z_u] and the
        encoders read phi(x) and y alone, without a shared score. Without support, r = 0 and z_u is the encoder's mean
        for no examples.

    Raises:
      ValueError: the model lacks `embed` or `width`, a size is not positive, `kl` is negative, or `faithful` with `kl`.

    Differs from the paper:
      - g returns the score of `loss`; the paper's g returns a mean and a variance.
      - Unless `faithful`: the likelihood is that of the query set alone, where the paper's targets include the support,
        and its divergence has a fixed weight; g corrects a shared model's score, which the encoders read too.

    References:
      Kim et al., Attentive Neural Processes, ICLR 2019, sections 2 and 3.
    """
    positive(size=size, hidden=hidden, heads=heads)
    weight = kl_weight(kl, faithful)
    if size % heads:
        raise ValueError(f"size must be a multiple of heads, got {size=}, {heads=}")
    embed, width = need_embed(model)
    score = reader(model, 2 * size, hidden, faithful=faithful)
    inputs, of_targets = width + (1 if faithful else 2), target_loss(loss)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 8)
        return score.init(keys[0]) | {
            "encoder": dense(keys[1], inputs, hidden, size),
            "self": attention(keys[2], size),
            "key": dense(keys[3], width, hidden, size),
            "cross": attention(keys[4], size),
            "latent_encoder": dense(keys[5], inputs, hidden, size),
            "latent_self": attention(keys[6], size),
            "latent": dense(keys[7], size, hidden, 2 * size),
        }

    def encode(params: Params, path: str, xy: jax.Array, mask: jax.Array) -> jax.Array:
        s = run(params[path + "encoder"], xy)
        return s + attend(params[path + "self"], s, s, s, mask, heads)

    def latent(params: Params, xy: jax.Array, mask: jax.Array) -> Normal:
        return normal(params["latent"], mean(encode(params, "latent_", xy, mask), mask))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        xy = pairs(model, params["model"], support, not faithful)
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
        z, divergence = sample(latent, model, params, task, key, not faithful)
        mean_divergence = masked_mean(divergence, jnp.any(task.query.mask > 0, axis=1))
        if faithful:
            bound = of_targets(partial(predict, params, adapted | {"z": z}), task, divergence)
            return bound, {"kl": mean_divergence}
        scores = predict(params, adapted | {"z": z}, task.query.features)
        return query_loss(scores, task.query, loss) + weight * mean_divergence, {"kl": mean_divergence}

    return Strategy(init, adapt, predict, meta_loss, contrast=False)


def pairs(model: Model, params: Params, examples: Examples, shared: bool) -> jax.Array:
    """Return the encoders' input for each example: `[embed, shared score, target]`, `[users, examples, width + 2]`.

    Without `shared`, it is `[embed, target]`, `[users, examples, width + 1]`.
    """
    embed, _ = need_embed(model)
    scores = [model.apply(params, examples.features)[..., None]] if shared else []
    both = jnp.concatenate([embed(params, examples.features), *scores, examples.target[..., None]], -1)
    return jnp.where(examples.mask[..., None] > 0, both, 0.0)


def mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean over each user's real examples, `[users, width]`; 0 without any."""
    return jax.vmap(jax.vmap(masked_mean, (1, None)))(values, mask)


def attention(key: jax.Array, size: int) -> Params:
    """Return the parameters of `attend`: four projections."""
    names = ("query", "key", "value", "out")
    keys = jax.random.split(key, len(names))
    return {name: matrix(k, size, size) for name, k in zip(names, keys, strict=True)}


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
    latent: Callable[..., Normal], model: Model, params: Params, task: Task, key: jax.Array, shared: bool
) -> tuple[jax.Array, jax.Array]:
    """Draw z `[users, size]` from q(z | support and query); also return the divergence to q(z | support), `[users]`."""
    sets = [(pairs(model, params["model"], part, shared), part.mask) for part in task]
    prior = latent(params, *sets[0])
    mu, sigma = latent(params, *(jnp.concatenate(parts, 1) for parts in zip(*sets, strict=True)))
    divergence = kl_divergence((mu, sigma), prior)
    return mu + sigma * normal_per_user(key, len(mu), mu.shape[1:]), divergence


def target_loss(loss: PointwiseLoss) -> Callable[..., jax.Array]:
    """Return `of_targets(predict, task, divergence=None)`, the loss per target of support and query plus a divergence.

        mean_u (sum_{i in support and query} loss_i + KL_u) / n_u

    `predict(features) -> scores` has the users' adapted values bound; `divergence` is KL_u `[users]`. Users without
    query examples are left out.

    Args:
      loss: elementwise loss of scores and targets.
    """
    as_constants = as_truth(loss)

    def of_targets(
        predict: Callable[[Features], jax.Array], task: Task, divergence: jax.Array | None = None
    ) -> jax.Array:
        parts = as_constants(task.support), task.query
        scores = jnp.concatenate([predict(part.features) for part in parts], 1)
        target, mask = (jnp.concatenate([getattr(part, name) for part in parts], 1) for name in ("target", "mask"))
        per_user = jax.vmap(partial(mean_loss, loss))(scores, Examples(None, target, mask))
        if divergence is not None:
            total = jnp.where(mask > 0, mask, 0.0).sum(1)
            per_user += divergence / jnp.where(total > 0, total, 1.0)
        return masked_mean(per_user, jnp.any(task.query.mask > 0, axis=1))

    return of_targets


def kl_weight(kl: float | None, faithful: bool) -> float:
    """Return the weight of the divergence, `KL` if `kl` is None.

    Raises:
      ValueError: `kl` is negative, or set although `faithful` fixes the weight.
    """
    if faithful and kl is not None:
        raise ValueError(f"faithful=True weighs the divergence by one over the number of targets; remove {kl=}")
    weight = KL if kl is None else kl
    not_negative(kl=weight)
    return weight


def positive(**options: float) -> None:
    if bad := [f"{name}={value}" for name, value in options.items() if value <= 0]:
        raise ValueError(f"must be positive: {', '.join(bad)}")


def not_negative(**options: float) -> None:
    if bad := [f"{name}={value}" for name, value in options.items() if value < 0]:
        raise ValueError(f"must not be negative: {', '.join(bad)}")
