"""Two-tower model: the dot product of a user network and an item network (Covington et al., RecSys 2016)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.data.schema import USER
from metarec_jax.models.model import Model, from_nnx
from metarec_jax.models.profile import ByField, bias, need_item_fields, profile, slots, sum_of_biases, table, vectors


class TwoTower(nnx.Module):
    """Two towers: score = <item tower, head + user tower> + head's bias + sum of field biases.

    The change of a user's adapted head is the part of the user vector that attributes do not explain.
    """

    def __init__(self, fields: Mapping[str, Field], width: int, hidden: Sequence[int], rngs: nnx.Rngs) -> None:
        self.fields = nnx.static({name: field.kind for name, field in fields.items()})
        self.embedding = nnx.Dict({name: table(field, width, rngs) for name, field in fields.items()})
        self.embedding_bias = nnx.Dict({name: bias(field, rngs) for name, field in fields.items()})
        users = {name: field for name, field in fields.items() if name.startswith(USER)}
        items = {name: field for name, field in fields.items() if not name.startswith(USER)}
        self.user_fields = nnx.static({name: field.kind for name, field in users.items()})
        self.item_fields = nnx.static({name: field.kind for name, field in items.items()})

        def tower(inputs: Mapping[str, Field]) -> nnx.List:
            sizes = [width * slots(inputs), *hidden, width]
            return nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(sizes)] if inputs else [])

        self.user, self.item = tower(users), tower(items)
        self.head = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def embed(self, features: ByField) -> jax.Array:
        """Compute the item vector `[..., width]`, the input of the head."""
        return self._run(self.item, self.item_fields, features)

    def __call__(self, features: ByField) -> jax.Array:
        """Compute scores `[...]` from features `[...]` or `[..., values]`."""
        item = self.embed(features)
        score = self.head(item)[..., 0]
        if self.user_fields:
            score += (item * self._run(self.user, self.user_fields, features)).sum(-1)
        return score + sum_of_biases(self.embedding_bias, features, self.fields)[..., 0]

    def _run(self, tower: nnx.List, kinds: Mapping[str, str], features: ByField) -> jax.Array:
        x = jnp.concatenate([*vectors(self.embedding, features, kinds).values()], -1)
        for layer in tower[:-1]:
            x = nnx.relu(layer(x))
        return tower[-1](x)


def two_tower(fields: Mapping[str, Field], *, width: int = 16, hidden: Sequence[int] = (32,)) -> Model:
    """Build a two-tower model: item vectors can be precomputed and searched by inner product.

        score = <v(item fields), h + u(user fields)> + b + sum_f b_f

    h and b are the head: the vector and bias of a user without attributes, until a strategy adapts them. `embed` is v.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.
      width: width of each field's embedding and of the towers' vectors.
      hidden: widths of each tower's hidden layers.

    Raises:
      ValueError: there is no item field.

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> model = mr.models.two_tower(mr.models.fields_of(data), width=4, hidden=(8,))
      >>> features = mr.tasks.features(data, users=np.array([0]), items=np.arange(41)[None])
      >>> jax.eval_shape(model.embed, jax.eval_shape(model.init, jax.random.key(0)), features).shape  # item vectors
      (1, 41, 4)

    References:
      Covington et al., Deep Neural Networks for YouTube Recommendations, RecSys 2016, section 3.
    """
    need_item_fields(fields)
    return from_nnx(lambda rngs: TwoTower(fields, width, hidden, rngs), profile(fields, width))
