"""Factorisation machines: every pair of fields interacts through the product of their vectors (FM, DeepFM)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.models.model import Model, from_nnx
from metarec_jax.models.profile import (
    PREFIX,
    ByField,
    bias,
    need_item_fields,
    profile,
    slots,
    sum_of_biases,
    table,
    vectors,
)


class FactorisationMachine(nnx.Module):
    """score = sum_f w_f + sum_{f<g} <v_f, v_g> + head([sum of the item fields' v_f, MLP([v_f])]).

    The user is one more field of the machine: its vector is the head's weight and its bias the head's bias, so that a
    user's adapted head is the user's own factor. Without hidden layers this is the plain machine.
    """

    def __init__(self, fields: Mapping[str, Field], width: int, hidden: Sequence[int], rngs: nnx.Rngs) -> None:
        self.fields = nnx.static({name: field.kind for name, field in fields.items()})
        self.embedding = nnx.Dict({name: table(field, width, rngs) for name, field in fields.items()})
        self.embedding_bias = nnx.Dict({name: bias(field, rngs) for name, field in fields.items()})
        sizes = [width * slots(fields), *hidden]
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(sizes)])
        inputs = width + (sizes[-1] if hidden else 0)
        self.head = nnx.Linear(inputs, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def vectors(self, features: ByField) -> dict[str, jax.Array]:
        """`[..., width]` of each field."""
        return vectors(self.embedding, features, self.fields)

    def embed(self, features: ByField) -> jax.Array:
        """Input of the head `[..., width]`: the item's vector, then the hidden layers' output."""
        return self._embed(self.vectors(features))

    def _embed(self, vectors: dict[str, jax.Array]) -> jax.Array:
        item = sum((v for name, v in vectors.items() if not name.startswith(PREFIX)), start=jnp.zeros(()))
        if not self.layers:
            return item
        x = jnp.concatenate(list(vectors.values()), -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return jnp.concatenate([item, x], -1)

    def __call__(self, features: ByField) -> jax.Array:
        """Scores `[...]` of features whose arrays are `[...]` or `[..., values]`."""
        vectors = self.vectors(features)
        stacked = jnp.stack(list(vectors.values()))
        # sum_{f<g} <v_f, v_g> = (|sum_f v_f|^2 - sum_f |v_f|^2) / 2
        pairs = (stacked.sum(0) ** 2 - (stacked**2).sum(0)).sum(-1) / 2
        biases = sum_of_biases(self.embedding_bias, features, self.fields)
        return (self.head(self._embed(vectors)) + biases)[..., 0] + pairs


def fm(fields: Mapping[str, Field], *, width: int = 16) -> Model:
    """A factorisation machine of second order.

        score = w_0 + sum_f w_f + sum_{f<g} <v_f, v_g> + <v_u, sum_{item fields} v_f>

    v_f is the vector of a field's value, of several values their mean, of numbers their combination; values of one
    field do not interact with each other. v_u and w_0 are the head, shared until a strategy adapts them.

    Args:
      fields: what a batch's features hold, by name.
      width: of the vectors.

    References:
      Rendle, Factorization Machines, ICDM 2010, eq. 1 and lemma 3.1.
    """
    return deepfm(fields, width=width, hidden=())


def deepfm(fields: Mapping[str, Field], *, width: int = 16, hidden: Sequence[int] = (32,)) -> Model:
    """A factorisation machine and an MLP side by side on the same vectors; their scores are added.

    Args:
      fields: what a batch's features hold, by name.
      width: of the vectors.
      hidden: widths of the hidden layers.

    Raises:
      ValueError: there is no field of the items.

    References:
      Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017, section 2.
    """
    need_item_fields(fields)
    return from_nnx(lambda rngs: FactorisationMachine(fields, width, hidden, rngs), profile(fields, width))
