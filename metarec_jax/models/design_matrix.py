"""Design matrix for closed-form learners: one-hot codes and standardised numbers, without parameters."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from metarec_jax.core.columns import add_to_columns
from metarec_jax.data.fields import NUMBERS, Field
from metarec_jax.data.schema import ITEM, ITEM_ID, STATISTICS, USER
from metarec_jax.models.model import Encoder, Model
from metarec_jax.models.profile import ByField, look_up
from metarec_jax.types import Features, Params

MOST = 512  # maximum columns per field; larger codes wrap around and share columns


def design(fields: Mapping[str, Field]) -> Model:
    """Build a parameter-free model of design-matrix rows: item fields in `embed`, user fields in `profile`.

        [1, one-hot codes, mean one-hot of multi-valued fields, standardised numbers and their squares]

    Scores are 0. For learners fitted in closed form, such as `ials`. The item id has no column.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.

    Example:
      Item 1 has the first of four genres: the columns are 1, the unknown genre and the four genres.

      >>> data = mr.data.synthetic(users=30, items=40)
      >>> features = mr.tasks.features(data, users=np.array([1]), items=np.array([[1]]))
      >>> mr.models.design(mr.models.fields_of(data)).embed({}, features)
      Array([[[1., 0., 1., 0., 0., 0.]]], dtype=float32)
    """
    items = {n: f for n, f in fields.items() if n.startswith(ITEM) and n != ITEM + STATISTICS}
    users = {n: f for n, f in fields.items() if n.startswith(USER)}

    def embed(params: Params, features: Features) -> jax.Array:
        return _columns(items, features)

    def apply(params: Params, features: Features) -> jax.Array:
        return jnp.zeros(jax.tree.leaves(features[ITEM_ID])[0].shape)

    profile = Encoder(lambda key: {}, lambda params, features: _columns(users, features), _width(users))
    return Model(lambda key: {}, apply, embed, width=_width(items), profile=profile, items=fields[ITEM_ID].size)


def _width(fields: Mapping[str, Field]) -> int:
    return 1 + sum(2 * f.width if f.kind in NUMBERS else min(f.size, MOST) for f in fields.values())


def _columns(fields: Mapping[str, Field], features: ByField) -> jax.Array:
    shape = jax.tree.leaves(features[ITEM_ID])[0].shape
    columns = [jnp.ones((*shape, 1))]
    for name, field in fields.items():
        if field.kind in NUMBERS:
            columns.append(look_up(lambda x: jnp.concatenate([x, x * x], -1), features[name], field.kind))
        else:
            columns.append(look_up(partial(_shares, min(field.size, MOST), field.kind), features[name], "categorical"))
    return jnp.concatenate(columns, -1)


def _shares(columns: int, kind: str, codes: jax.Array) -> jax.Array:
    """Compute the mean one-hot `[..., columns]` of codes `[...]` or `[..., values]`; code 0 (unknown) is left out."""
    codes = codes if kind == "multi" else codes[..., None]
    flat = codes.reshape(-1, codes.shape[-1])
    known = (flat > 0).astype(jnp.float32)
    share = known / jnp.maximum(known.sum(1, keepdims=True), 1)
    shares = add_to_columns(jnp.zeros((len(flat), columns)), flat % columns, share)
    return shares.reshape(*codes.shape[:-1], columns)
