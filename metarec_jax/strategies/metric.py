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


def prototypes(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, count: float = 1.0) -> Strategy:
    """Prototypical network: an item scores higher the nearer it is to liked than to disliked examples.

        p_c = (k q_c + sum_i w_ic phi(x_i)) / (k + sum_i w_ic),   c = 0 (disliked), 1 (liked)
        score(x) = f(x) + a (|phi(x) - p_0|^2 - |phi(x) - p_1|^2) + b log((k + sum_i w_i1) / (k + sum_i w_i0))

    f is the shared model and phi the input of its head. For clicks, w_i1 = 1 - w_i0 is the target (cut to [0, 1],
    because learned labels may leave it). For (standardised) ratings it is sigmoid(target), so that a rating belongs to
    both classes in part. k, q, a and b are learned.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      count: initial k.

    Raises:
      ValueError: the model lacks `embed` or `width`, or `count` is not positive.

    Differs from the paper:
      - The score of the shared model f is added.
      - A class starts with k pseudo-examples at a learned point q_c, so that an empty class has a prototype.
      - Bayes's rule keeps the log odds of the class frequencies, with weight b, because support sets are unbalanced.
      - The distances have a learned factor a.

    References:
      Snell et al., Prototypical Networks for Few-shot Learning, NIPS 2017, equations 1 and 2.
    """

    def correction(own: Params, mean: jax.Array, phi: jax.Array) -> jax.Array:
        distance = jnp.square(phi[:, None] - mean[:, :, None]).sum(-1)
        return own["scale"] * (distance[:, 0] - distance[:, 1])

    return from_classes(model, loss, count, lambda key, width: {"scale": jnp.ones(())}, correction)


def lwa(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, count: float = 1.0) -> Strategy:
    """Linear weight adaptation: a linear classifier whose weights are a linear combination of the user's class means.

        score(x) = f(x) + phi(x) . (v_0 p_0 + v_1 p_1) + b log((k + sum_i w_i1) / (k + sum_i w_i0))

    v_0 and v_1 are learned numbers; f, p, w, k and b as in `prototypes`.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      count: initial k.

    Raises:
      ValueError: the model lacks `embed` or `width`, or `count` is not positive.

    Differs from the paper:
      - It adapts to users; the paper adapts to items from the users they were shown to.
      - The score of the shared model f is added, and a class starts with k pseudo-examples, as in `prototypes`.
      - The last term varies by user; the paper's bias is the same for all.

    References:
      Vartak et al., A Meta-Learning Perspective on Cold-Start Recommendations for Items, NIPS 2017, section 4.2.
    """

    def correction(own: Params, mean: jax.Array, phi: jax.Array) -> jax.Array:
        return jnp.einsum("unf,c,ucf->un", phi, own["weight"], mean)

    return from_classes(model, loss, count, lambda key, width: {"weight": jnp.array([-1.0, 1.0])}, correction)


def nlba(
    model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, count: float = 1.0, hidden: int = 32
) -> Strategy:
    """Non-linear bias adaptation: a neural classifier whose biases are linear in the user's class means.

        h(x) = relu(W phi(x) + V_0 p_0 + V_1 p_1 + c)
        score(x) = f(x) + v . h(x) + u_0 . p_0 + u_1 . p_1 + b log((k + sum_i w_i1) / (k + sum_i w_i0))

    All weights are shared by the users; f, p, w, k and b as in `prototypes`.

    Args:
      model: needs `embed` and `width`.
      loss: elementwise loss of scores and targets.
      count: initial k.
      hidden: width of the hidden layer.

    Raises:
      ValueError: the model lacks `embed` or `width`, or `count` or `hidden` is not positive.

    Differs from the paper:
      - It adapts to users; the paper adapts to items.
      - The score of the shared model f and the last term are added, and a class starts with k pseudo-examples, as in
        `prototypes`.

    References:
      Vartak et al., A Meta-Learning Perspective on Cold-Start Recommendations for Items, NIPS 2017, section 4.3.
    """
    if hidden < 1:
        raise ValueError(f"hidden must be 1 or more, got {hidden}")

    def init(key: jax.Array, width: int) -> Params:
        layer, shift, out = jax.random.split(key, 3)
        return {
            "layer": jax.random.normal(layer, (width, hidden)) / width**0.5,
            "shift": jax.random.normal(shift, (2, width, hidden)) / width**0.5,
            "bias": jnp.zeros(hidden),
            "out": jax.random.normal(out, (hidden,)) / hidden**0.5,
            "skip": jnp.zeros((2, width)),
        }

    def correction(own: Params, mean: jax.Array, phi: jax.Array) -> jax.Array:
        bias = own["bias"] + jnp.einsum("ucf,cfh->uh", mean, own["shift"])
        layer = jax.nn.relu(phi @ own["layer"] + bias[:, None])
        return layer @ own["out"] + jnp.einsum("ucf,cf->u", mean, own["skip"])[:, None]

    return from_classes(model, loss, count, init, correction)


def from_classes(
    model: Model,
    loss: PointwiseLoss,
    count: float,
    own_init: Callable[[jax.Array, int], Params],
    correction: Callable[[Params, jax.Array, jax.Array], jax.Array],
) -> Strategy:
    """Build a strategy that adds `correction(own, class means, phi)` and the weighted log odds to the shared score.

    Args:
      model, loss, count: see `prototypes`.
      own_init: `own_init(key, width) -> own`, the parameters of the correction.
      correction: `correction(own, mean [users, 2, width], phi [users, examples, width]) -> [users, examples]`.
    """
    embed, width = need_embed(model)
    if count <= 0:
        raise ValueError(f"count must be positive, got {count}")
    clicks = likelihood(loss) == "bernoulli"

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        return {
            "model": model.init(first),
            "own": own_init(second, width),
            "centre": jnp.zeros((2, width)),
            "log_count": jnp.log(jnp.float32(count)),
            "odds": jnp.ones(()),
        }

    def adapt(params: Params, support: Examples, key: jax.Array) -> Classes:
        keep, prior = support.mask > 0, jnp.exp(params["log_count"])
        phi = jnp.where(keep[..., None], embed(params["model"], support.features), 0.0)
        target = jnp.where(keep, support.target, 0.0)
        liked = jnp.clip(target, 0, 1) if clicks else jax.nn.sigmoid(target)
        member = jnp.where(keep, support.mask, 0.0)[:, None] * jnp.stack([1 - liked, liked], 1)
        total = prior + member.sum(-1)
        mean = (prior * params["centre"] + jnp.einsum("ucn,unf->ucf", member, phi)) / total[..., None]
        return Classes(mean, jnp.log(total[:, 1] / total[:, 0]))

    def predict(params: Params, classes: Classes, features: Features) -> jax.Array:
        phi, shared = embed(params["model"], features), model.apply(params["model"], features)
        return shared + correction(params["own"], classes.mean, phi) + params["odds"] * classes.log_odds[:, None]

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = predict(params, adapt(params, task.support, key), task.query.features)
        return query_loss(scores, task.query, loss), {}

    return Strategy(init, adapt, predict, meta_loss, contrast=False)
