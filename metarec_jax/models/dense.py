"""Embedding + MLP over feature fields, with an explicit bias of every field (wide and deep, Cheng et al., 2016)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.models.model import Model, from_nnx
from metarec_jax.models.profile import PREFIX, ByField, bias, profile, slots, sum_of_biases, table, vectors


class EmbeddingMLP(nnx.Module):
    """score = sum of field biases + head(MLP([field embeddings])).

    The item id has a bias and an embedding too, so that `score = item bias + user bias + ...` is in the model's reach
    without any hidden layer; the user bias is the bias of the head, which strategies adapt. Without hidden layers user
    fields have a bias only: an embedding of theirs would add the same number to all of a user's scores.
    """

    def __init__(self, fields: Mapping[str, Field], width: int, hidden: Sequence[int], rngs: nnx.Rngs) -> None:
        self.fields = nnx.static({name: field.kind for name, field in fields.items()})
        tables: dict[str, nnx.Module] = {}
        biases: dict[str, nnx.Module] = {}
        for name, field in fields.items():
            biases[name] = bias(field, rngs)
            if hidden or not name.startswith(PREFIX):
                tables[name] = table(field, width, rngs)
        self.deep = nnx.static({name: fields[name].kind for name in tables})
        self.embedding, self.embedding_bias = nnx.Dict(tables), nnx.Dict(biases)
        sizes = [width * slots({name: fields[name] for name in tables}), *hidden]
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(sizes)])
        self.head = nnx.Linear(sizes[-1], 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def embed(self, features: ByField) -> jax.Array:
        """Input of the head `[..., width]`."""
        x = jnp.concatenate([*vectors(self.embedding, features, self.deep).values()], -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x

    def __call__(self, features: ByField) -> jax.Array:
        """Scores `[...]` of features whose arrays are `[...]` or `[..., values]`."""
        return (self.head(self.embed(features)) + self.bias(features))[..., 0]

    def bias(self, features: ByField) -> jax.Array:
        """Sum of the field biases `[..., 1]`."""
        return sum_of_biases(self.embedding_bias, features, self.fields)


def mlp(fields: Mapping[str, Field], *, width: int = 16, hidden: Sequence[int] = (32,)) -> Model:
    """The embedding + MLP tower for these fields (`metarec_jax.models.fields_of(data)`).

    Args:
      fields: what a batch's features hold, by name.
      width: width of each field's embedding.
      hidden: widths of the hidden layers.
    """
    return from_nnx(lambda rngs: EmbeddingMLP(fields, width, hidden, rngs), profile(fields, width))


def linear(fields: Mapping[str, Field], *, width: int = 16) -> Model:
    """A factorisation model: the head reads the item fields' embeddings directly, so that a user's adapted head is the
    user's factor (what matrix factorisation calls p_u) and every field keeps its bias.

    Args:
      fields: what a batch's features hold, by name.
      width: width of each item field's embedding.
    """
    return mlp(fields, width=width, hidden=())
