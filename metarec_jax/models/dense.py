"""Embedding + MLP over feature fields, with a bias for every field (wide and deep, Cheng et al., 2016)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.data.schema import USER
from metarec_jax.models.model import Model, from_nnx
from metarec_jax.models.profile import ByField, bias, profile, slots, sum_of_biases, table, vectors


class EmbeddingMLP(nnx.Module):
    """Embedding + MLP: score = sum of field biases + head(MLP([field embeddings])).

    The item id has both a bias and an embedding, so the model contains `score = item bias + user bias + ...` even
    without hidden layers. The user bias is the bias of the head, which strategies adapt. Without hidden layers user
    fields have a bias only: their embedding would add the same number to all of a user's scores.
    """

    def __init__(self, fields: Mapping[str, Field], width: int, hidden: Sequence[int], rngs: nnx.Rngs) -> None:
        self.fields = nnx.static({name: field.kind for name, field in fields.items()})
        tables: dict[str, nnx.Module] = {}
        biases: dict[str, nnx.Module] = {}
        for name, field in fields.items():
            biases[name] = bias(field, rngs)
            if hidden or not name.startswith(USER):
                tables[name] = table(field, width, rngs)
        self.deep = nnx.static({name: fields[name].kind for name in tables})
        self.embedding, self.embedding_bias = nnx.Dict(tables), nnx.Dict(biases)
        sizes = [width * slots({name: fields[name] for name in tables}), *hidden]
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(sizes)])
        self.head = nnx.Linear(sizes[-1], 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def embed(self, features: ByField) -> jax.Array:
        """Compute the input of the head, `[..., width]`."""
        x = jnp.concatenate([*vectors(self.embedding, features, self.deep).values()], -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x

    def __call__(self, features: ByField) -> jax.Array:
        """Compute scores `[...]` from features `[...]` or `[..., values]`."""
        return (self.head(self.embed(features)) + self.bias(features))[..., 0]

    def bias(self, features: ByField) -> jax.Array:
        """Sum the field biases, `[..., 1]`."""
        return sum_of_biases(self.embedding_bias, features, self.fields)


def mlp(fields: Mapping[str, Field], *, width: int = 16, hidden: Sequence[int] = (32,)) -> Model:
    """Build an embedding + MLP model.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.
      width: width of each field's embedding.
      hidden: widths of the hidden layers.

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> model = mr.models.mlp(mr.models.fields_of(data), width=4, hidden=(8,))
      >>> features = mr.tasks.features(data, users=np.array([1, 2]), items=np.array([[1, 2, 3], [4, 5, 6]]))
      >>> model.apply(jax.jit(model.init)(jax.random.key(0)), features).shape
      (2, 3)
    """
    return from_nnx(lambda rngs: EmbeddingMLP(fields, width, hidden, rngs), profile(fields, width))


def linear(fields: Mapping[str, Field], *, width: int = 16) -> Model:
    """Build a matrix-factorisation model: a linear head on the item fields' embeddings, and a bias per field.

    A user's adapted head is the user factor p_u of matrix factorisation.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.
      width: width of each item field's embedding.

    Example:
      The embeddings of the item and of its genre are joined, so that a user's factor has width 2 * 8:

      >>> model = mr.models.linear(mr.models.fields_of(mr.data.synthetic(users=30, items=40)), width=8)
      >>> model.width
      16
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> params["head"]["kernel"].shape, params["embedding"]["item_id"]["embedding"].shape
      ((16, 1), (41, 8))
    """
    return mlp(fields, width=width, hidden=())
