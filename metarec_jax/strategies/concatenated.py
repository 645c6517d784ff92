"""Concatenated: a network that reads a context vector as an additional input of one layer, as in several papers."""

import jax
import jax.numpy as jnp

from metarec_jax.models.model import Model
from metarec_jax.strategies.decoder import Decoder, decoder, need_embed
from metarec_jax.strategies.networks import dense, run
from metarec_jax.types import Features, Params


def concatenated(model: Model, size: int, hidden: int = 32) -> Decoder:
    """Build a network on `embed` whose first layer also reads a context vector c.

        score(x) = v . relu(W [phi(x), c] + b) + b_0

    The score of the shared model is not added, unlike in `decoder`: its head is not used.

    Args:
      model: needs `embed` and `width`.
      size: width of the context vector.
      hidden: width of the hidden layer.

    Raises:
      ValueError: the model lacks `embed` or `width`.
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
    """Return `concatenated` if `faithful`, else `decoder`."""
    return (concatenated if faithful else decoder)(model, size, hidden)
