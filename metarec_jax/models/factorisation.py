"""Factorisation machines: FM and DeepFM, with pairwise products of field vectors."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.data.schema import USER
from metarec_jax.models.model import Model, from_nnx
from metarec_jax.models.profile import ByField, bias, need_item_fields, profile, slots, sum_of_biases, table, vectors


class FactorisationMachine(nnx.Module):
    """DeepFM: score = sum_f w_f + sum_{f<g} <v_f, v_g> + head([sum of the item fields' v_f, MLP([v_f])]).

    The user is one more field, with the head's weight as its vector and the head's bias as its bias. So a user's
    adapted head is the user's factor. Without hidden layers this is the plain FM.
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
        """Return the vector `[..., width]` of each field."""
        return vectors(self.embedding, features, self.fields)

    def embed(self, features: ByField) -> jax.Array:
        """Compute the input of the head, `[..., width]`: the item's vector, then the hidden layers' output."""
        return self._embed(self.vectors(features))

    def _embed(self, vectors: dict[str, jax.Array]) -> jax.Array:
        item = sum((v for name, v in vectors.items() if not name.startswith(USER)), start=jnp.zeros(()))
        if not self.layers:
            return item
        x = jnp.concatenate(list(vectors.values()), -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return jnp.concatenate([item, x], -1)

    def __call__(self, features: ByField) -> jax.Array:
        """Compute scores `[...]` from features `[...]` or `[..., values]`."""
        vectors = self.vectors(features)
        stacked = jnp.stack(list(vectors.values()))
        # sum_{f<g} <v_f, v_g> = (|sum_f v_f|^2 - sum_f |v_f|^2) / 2
        pairs = (stacked.sum(0) ** 2 - (stacked**2).sum(0)).sum(-1) / 2
        biases = sum_of_biases(self.embedding_bias, features, self.fields)
        return (self.head(self._embed(vectors)) + biases)[..., 0] + pairs


def fm(fields: Mapping[str, Field], *, width: int = 16) -> Model:
    """Build a second-order factorisation machine.

        score = w_0 + sum_f w_f + sum_{f<g} <v_f, v_g> + <v_u, sum_{item fields} v_f>

    v_f is the vector of a field: that of its value, the mean over several values, or a linear layer of numbers. Values
    of one field do not interact with each other. v_u and w_0 are the head, shared until a strategy adapts them.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.
      width: width of the vectors.

    Raises:
      ValueError: there is no item field.

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> model = mr.models.fm(mr.models.fields_of(data), width=4)
      >>> features = mr.tasks.features(data, users=np.array([1, 2]), items=np.array([[1, 2, 3], [4, 5, 6]]))
      >>> model.apply(jax.jit(model.init)(jax.random.key(0)), features).shape
      (2, 3)

    References:
      Rendle, Factorization Machines, ICDM 2010, eq. 1 and lemma 3.1.
    """
    return deepfm(fields, width=width, hidden=())


def deepfm(fields: Mapping[str, Field], *, width: int = 16, hidden: Sequence[int] = (32,)) -> Model:
    """Build a DeepFM: the sum of a factorisation machine and an MLP on the same vectors.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.
      width: width of the vectors.
      hidden: widths of the hidden layers.

    Raises:
      ValueError: there is no item field.

    Example:
      >>> model = mr.models.deepfm(mr.models.fields_of(mr.data.synthetic(users=30, items=40)), width=4, hidden=(8,))
      >>> model.width  # the sum of the item fields' vectors, and the last hidden layer
      12

    References:
      Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017, section 2.
    """
    need_item_fields(fields)
    return from_nnx(lambda rngs: FactorisationMachine(fields, width, hidden, rngs), profile(fields, width))
