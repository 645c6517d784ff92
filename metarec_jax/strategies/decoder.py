"""Decoder: a network on a shared model that reads a context vector of each user; many strategies adapt through it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax import core
from metarec_jax.models.model import Model
from metarec_jax.strategies.networks import dense, run
from metarec_jax.types import Examples, Features, Params


class Decoder(NamedTuple):
    """A model and a small network on top of it that reads a context vector.

    Attributes:
      init: `init(key) -> params`, with the model's own parameters under "model".
      apply: `apply(params, context, features [users, examples, ...]) -> scores [users, examples]`. The context is per
        user, `[users, size]`, or per example, `[users, examples, size]`.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, Features], jax.Array]


def decoder(model: Model, size: int, hidden: int = 32) -> Decoder:
    """Build a decoder: the scores of a shared model, corrected by a context vector c for each user.

        score(x) = f(x) + [phi(x), 1] . (H c) + v . relu((1 + G c) * (W phi(x)) + B c) - v . relu(W phi(x))

    f is the model and phi its `embed`. The first correction is a linear head of the user, generated from c (Ha et al.,
    HyperNetworks, ICLR 2017). The second modulates a hidden layer (FiLM, Perez et al., AAAI 2018). With c = 0 the score
    is that of the shared model.

    Args:
      model: needs `embed` and `width`.
      size: width of the context vector.
      hidden: width of the hidden layer.

    Raises:
      ValueError: the model lacks `embed` or `width`.
    """
    embed, width = need_embed(model)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 6)
        normal = jax.random.normal
        return {
            "model": model.init(keys[0]),
            "head": normal(keys[1], (size, width + 1)) / size**0.5,
            "layer": normal(keys[2], (width, hidden)) / width**0.5,
            "scale": 0.1 * normal(keys[3], (size, hidden)) / size**0.5,
            "shift": 0.1 * normal(keys[4], (size, hidden)) / size**0.5,
            "out": normal(keys[5], (hidden,)) / hidden**0.5,
        }

    def apply(params: Params, context: jax.Array, features: Features) -> jax.Array:
        phi = embed(params["model"], features)
        context = context[:, None] if context.ndim == 2 else context
        head = context @ params["head"]
        linear = (phi * head[..., :-1]).sum(-1) + head[..., -1]
        layer = phi @ params["layer"]
        scale, shift = (context @ params[name] for name in ("scale", "shift"))
        modulated = jax.nn.relu((1 + scale) * layer + shift) - jax.nn.relu(layer)
        return model.apply(params["model"], features) + linear + modulated @ params["out"]

    return Decoder(init, apply)


def concatenated(model: Model, size: int, hidden: int = 32) -> Decoder:
    """Build a network on `embed` whose first layer reads c too; arguments and errors as `decoder`.

        score(x) = v . relu(W [phi(x), c] + b) + b_0

    The score of the shared model is not added: its head is not used.
    """
    embed, width = need_embed(model)

    def init(key: jax.Array) -> Params:
        a, b = jax.random.split(key)
        return {"model": model.init(a), "layers": dense(b, width + size, hidden, 1)}

    def apply(params: Params, context: jax.Array, features: Features) -> jax.Array:
        phi = embed(params["model"], features)
        context = context[:, None] if context.ndim == 2 else context
        context = jnp.broadcast_to(context, (*phi.shape[:-1], size))
        return run(params["layers"], jnp.concatenate([phi, context], -1))[..., 0]

    return Decoder(init, apply)


def reader(model: Model, size: int, hidden: int = 32, *, faithful: bool) -> Decoder:
    """Return `concatenated` if `faithful`, as in several papers, else `decoder`."""
    return (concatenated if faithful else decoder)(model, size, hidden)


def adapt_context(
    score: Decoder, params: Params, start: jax.Array, support: Examples, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Adapt context vectors by inner steps on the support; all other parameters stay fixed.

    The adapted parameter is the distance from the start, initially 0 for all users; the start itself is a feature.

    Args:
      score: `decoder(model, size)`.
      params: parameters of the decoder.
      start: `[users, size]` initial context vectors.
      support: each user's support set.
      **options: keyword arguments of `core.adapt`: loss, optimiser, steps, step size.

    Returns:
      The vectors `[users, size]`, and which users `[users]` failed and kept the start.
    """

    def apply(p: Params, features: Features) -> jax.Array:
        initial, now = features
        return score_one(score, p["decoder"], initial + p["moved"], now)

    shared = {"decoder": params, "moved": jnp.zeros(start.shape[1])}
    examples = support._replace(features=(start, support.features))
    adapted = core.adapt(apply, shared, examples, adapted={"decoder": False, "moved": True}, **options)
    moved = core.weights(shared, adapted)["moved"]
    return (start if moved is None else start + moved), adapted.failed


def score_one(score: Decoder, params: Params, context: jax.Array, features: Features) -> jax.Array:
    """Score one user's examples, `[examples]`, from a context `[size]` and features `[examples, ...]`."""
    return score.apply(params, context[None], jax.tree.map(lambda x: x[None], features))[0]


def need_embed(model: Model) -> tuple[Callable[[Params, Features], jax.Array], int]:
    """Return the model's `embed` and `width`, which the strategy requires.

    Raises:
      ValueError: the model lacks one of them.
    """
    if model.embed is None or model.width is None:
        raise ValueError(
            "this strategy needs a model with `embed`, the features below its head, and their `width`; pass "
            "Model(init, apply, embed=..., width=...) or a model of metarec_jax.models"
        )
    return model.embed, model.width
