"""Prototypes, LWA and NLBA: a user is represented by the mean embeddings of liked and of disliked examples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import need_embed
from metarec_jax.strategies.likelihood import likelihood
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task


class Classes(NamedTuple):
    """A user's two classes, disliked and liked.

    Attributes:
      mean: `[users, 2, width]` mean embedding of each class.
      log_odds: `[users]` log of the number of liked over disliked examples.
    """

    mean: jax.Array
    log_odds: jax.Array


def prototypes(
    model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, count: float = 1.0, faithful: bool = False
) -> Strategy:
    """Prototypical network: an item scores higher the nearer it is to liked than to disliked examples.

        p_c = (k q_c + sum_i w_ic phi(x_i)) / (k + sum_i w_ic),   c = 0 (disliked), 1 (liked)
        score(x) = f(x) + a (|phi(x) - p_0|^2 - |phi(x) - p_1|^2) + b log((k + sum_i w_i1) / (k + sum_i w_i0))

    f is the shared model and phi the input of its head. For clicks, w_i1 = 1 - w_i0 is the target (cut to [0, 1],
    because learned labels may leave it). For (standardised) ratings it is sigmoid(target), so that a rating belongs to
    both classes in part. k, q, a and b are learned.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      count: initial k; not used if `faithful`.
      faithful: score(x) = |phi(x) - p_0|^2 - |phi(x) - p_1|^2 with p_c the mean of the class, the log odds of equation
        2 of the paper. The prototype of an empty class is 0, so that the score is 0 without support. Needs the logistic
        loss.

    Raises:
      ValueError: the model lacks `embed` or `width`, `count` is not positive, or `faithful` with another loss.

    Differs from the paper, unless `faithful`:
      - The score of the shared model f is added.
      - A class starts with k pseudo-examples at a learned point q_c, so that an empty class has a prototype.
      - Bayes's rule keeps the log odds of the class frequencies, with weight b, because support sets are unbalanced.
      - The distances have a learned factor a.

    Example:
      A user likes item 0 and dislikes item 1. Each prototype is halfway between its item and the pseudo-example at 0:

      >>> import optax
      >>> model = mr.Model(init=lambda key: jnp.zeros(2), apply=lambda w, x: x @ w, embed=lambda w, x: x, width=2)
      >>> strategy = mr.prototypes(model, loss=optax.losses.sigmoid_binary_cross_entropy)
      >>> params, items = jax.jit(strategy.init)(jax.random.key(0)), jnp.eye(2)[None]  # [users, examples, width]
      >>> support = mr.Examples(items, jnp.array([[1.0, 0.0]]), jnp.ones((1, 2)))
      >>> classes = jax.jit(strategy.adapt)(params, support, jax.random.key(1))
      >>> classes.mean, jax.jit(strategy.predict)(params, classes, items)
      (Array([[[0. , 0.5],
              [0.5, 0. ]]], dtype=float32), Array([[ 1., -1.]], dtype=float32))

    References:
      Snell et al., Prototypical Networks for Few-shot Learning, NIPS 2017, equations 1 and 2.
    """

    def correction(own: Params, mean: jax.Array, phi: jax.Array) -> jax.Array:
        distance = jnp.square(phi[:, None] - mean[:, :, None]).sum(-1)
        difference = distance[:, 0] - distance[:, 1]
        return difference if faithful else own["scale"] * difference

    def init(key: jax.Array, width: int) -> Params:
        return {} if faithful else {"scale": jnp.ones(())}

    return from_classes(model, loss, count, init, correction, faithful)


def lwa(
    model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, count: float = 1.0, faithful: bool = False
) -> Strategy:
    """Linear weight adaptation: a linear classifier whose weights are a linear combination of the user's class means.

        score(x) = f(x) + phi(x) . (v_0 p_0 + v_1 p_1) + b log((k + sum_i w_i1) / (k + sum_i w_i0))

    v_0 and v_1 are learned numbers; f, p, w, k and b as in `prototypes`.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      count: initial k; not used if `faithful`.
      faithful: score(x) = phi(x) . (v_0 p_0 + v_1 p_1) + b with one learned bias b and p_c the mean of the class, as in
        section 4.2 of the paper. The mean of an empty class is 0, so that the score is b without support. Needs the
        logistic loss.

    Raises:
      ValueError: the model lacks `embed` or `width`, `count` is not positive, or `faithful` with another loss.

    Differs from the paper, unless `faithful`:
      - The score of the shared model f is added, and a class starts with k pseudo-examples, as in `prototypes`.
      - The last term varies by user; the paper's bias is the same for all.

    References:
      Vartak et al., A Meta-Learning Perspective on Cold-Start Recommendations for Items, NIPS 2017, section 4.2.
    """

    def correction(own: Params, mean: jax.Array, phi: jax.Array) -> jax.Array:
        score = jnp.einsum("unf,c,ucf->un", phi, own["weight"], mean)
        return score + own["bias"] if faithful else score

    def init(key: jax.Array, width: int) -> Params:
        own = {"weight": jnp.array([-1.0, 1.0])}
        return own | {"bias": jnp.zeros(())} if faithful else own

    return from_classes(model, loss, count, init, correction, faithful)


def nlba(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    count: float = 1.0,
    hidden: int = 32,
    faithful: bool = False,
) -> Strategy:
    """Non-linear bias adaptation: a neural classifier whose biases are linear in the user's class means.

        h(x) = relu(W phi(x) + V_0 p_0 + V_1 p_1 + c)
        score(x) = f(x) + v . h(x) + u_0 . p_0 + u_1 . p_1 + b log((k + sum_i w_i1) / (k + sum_i w_i0))

    All weights are shared by the users; f, p, w, k and b as in `prototypes`.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      count: initial k; not used if `faithful`.
      hidden: width of the hidden layer.
      faithful: h(x) = relu(W phi(x) + V_0 p_0 + V_1 p_1) and score(x) = v . h(x) + u_0 . p_0 + u_1 . p_1 with p_c the
        mean of the class, as in section 4.3 of the paper. The mean of an empty class is 0, so that the score is
        v . relu(W phi(x)) without support. Needs the logistic loss.

    Raises:
      ValueError: the model lacks `embed` or `width`, `count` or `hidden` is not positive, or `faithful` with another
        loss.

    Differs from the paper, unless `faithful`:
      - The score of the shared model f, the shared bias c and the last term are added.
      - A class starts with k pseudo-examples, as in `prototypes`.

    References:
      Vartak et al., A Meta-Learning Perspective on Cold-Start Recommendations for Items, NIPS 2017, section 4.3.
    """
    if hidden < 1:
        raise ValueError(f"hidden must be 1 or more, got {hidden}")

    def init(key: jax.Array, width: int) -> Params:
        layer, shift, out = jax.random.split(key, 3)
        own = {
            "layer": jax.random.normal(layer, (width, hidden)) / width**0.5,
            "shift": jax.random.normal(shift, (2, width, hidden)) / width**0.5,
            "out": jax.random.normal(out, (hidden,)) / hidden**0.5,
            "skip": jnp.zeros((2, width)),
        }
        return own if faithful else own | {"bias": jnp.zeros(hidden)}

    def correction(own: Params, mean: jax.Array, phi: jax.Array) -> jax.Array:
        bias = jnp.einsum("ucf,cfh->uh", mean, own["shift"])
        bias = bias if faithful else own["bias"] + bias
        layer = jax.nn.relu(phi @ own["layer"] + bias[:, None])
        return layer @ own["out"] + jnp.einsum("ucf,cf->u", mean, own["skip"])[:, None]

    return from_classes(model, loss, count, init, correction, faithful)


def from_classes(
    model: Model,
    loss: PointwiseLoss,
    count: float,
    own_init: Callable[[jax.Array, int], Params],
    correction: Callable[[Params, jax.Array, jax.Array], jax.Array],
    faithful: bool,
) -> Strategy:
    """Build a strategy that adds `correction(own, class means, phi)` and the weighted log odds to the shared score.

    Args:
      model, loss, count: see `prototypes`.
      own_init: `own_init(key, width) -> own`, the parameters of the correction.
      correction: `correction(own, mean [users, 2, width], phi [users, examples, width]) -> [users, examples]`.
      faithful: return the correction alone, without pseudo-examples in the means.

    Raises:
      ValueError: the model lacks `embed` or `width`, `count` is not positive, or `faithful` without the logistic loss.
    """
    embed, width = need_embed(model)
    if count <= 0:
        raise ValueError(f"count must be positive, got {count}")
    clicks = likelihood(loss) == "bernoulli"
    if faithful and not clicks:
        raise ValueError(
            "faithful=True is a classifier of clicks: it needs the logistic loss (objective click or ranking)"
        )

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        params = {"model": model.init(first), "own": own_init(second, width)}
        if faithful:
            return params
        return params | {
            "centre": jnp.zeros((2, width)),
            "log_count": jnp.log(jnp.float32(count)),
            "odds": jnp.ones(()),
        }

    def adapt(params: Params, support: Examples, key: jax.Array) -> Classes:
        keep = support.mask > 0
        phi = jnp.where(keep[..., None], embed(params["model"], support.features), 0.0)
        target = jnp.where(keep, support.target, 0.0)
        liked = jnp.clip(target, 0, 1) if clicks else jax.nn.sigmoid(target)
        member = jnp.where(keep, support.mask, 0.0)[:, None] * jnp.stack([1 - liked, liked], 1)
        summed = jnp.einsum("ucn,unf->ucf", member, phi)
        if faithful:
            total = member.sum(-1)
            return Classes(summed / jnp.where(total > 0, total, 1.0)[..., None], jnp.zeros_like(total[:, 0]))
        prior = jnp.exp(params["log_count"])
        total = prior + member.sum(-1)
        mean = (prior * params["centre"] + summed) / total[..., None]
        return Classes(mean, jnp.log(total[:, 1] / total[:, 0]))

    def predict(params: Params, classes: Classes, features: Features) -> jax.Array:
        phi = embed(params["model"], features)
        if faithful:
            return correction(params["own"], classes.mean, phi)
        shared = model.apply(params["model"], features)
        return shared + correction(params["own"], classes.mean, phi) + params["odds"] * classes.log_odds[:, None]

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = predict(params, adapt(params, task.support, key), task.query.features)
        return query_loss(scores, task.query, loss), {}

    return Strategy(init, adapt, predict, meta_loss, contrast=False)
