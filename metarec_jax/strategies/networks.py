"""Networks: the small dense networks that strategies have beside the model."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp

from metarec_jax.types import Params


def matrix(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """Draw a layer's weights `[inputs, outputs]`, scaled to preserve the variance of its inputs."""
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5


def dense(key: jax.Array, *widths: int) -> list[Params]:
    """Return the layers of a fully connected network, with relu between them; `widths` run from input to output."""
    keys = jax.random.split(key, len(widths) - 1)
    return [{"weight": matrix(k, i, o), "bias": jnp.zeros(o)} for k, (i, o) in zip(keys, pairwise(widths), strict=True)]


def run(layers: Sequence[Params], x: jax.Array) -> jax.Array:
    """Apply the network of `dense` to `[..., width]`."""
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
    return x @ layers[-1]["weight"] + layers[-1]["bias"]
