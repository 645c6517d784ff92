"""Design: fields as they are, without parameters: one-hot codes and standardised numbers, for closed-form learners."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from metarec_jax.data.fields import NUMBERS, Field
from metarec_jax.models.model import Encoder, Model
from metarec_jax.models.profile import PREFIX, ByField, look_up
from metarec_jax.tasks.statistics import NAME as STATISTICS
from metarec_jax.types import Features, Params

MOST = 512  # columns of one field; codes beyond share columns


def design(fields: Mapping[str, Field]) -> Model:
    """The fields of items (`embed`) and of users (`profile`) as rows of a design matrix; scores are 0.

        [1, one-hot codes, mean one-hot of several codes, standardised numbers and their squares]

    It has no parameters: what reads it is fitted in closed form, as `ials` is. The item id is no column.

    Args:
      fields: what a batch's features hold, by name.
    """
    items = {n: f for n, f in fields.items() if n.startswith("item/") and n != f"item/{STATISTICS}"}
    users = {n: f for n, f in fields.items() if n.startswith(PREFIX)}

    def embed(params: Params, features: Features) -> jax.Array:
        return _columns(items, features)

    def apply(params: Params, features: Features) -> jax.Array:
        return jnp.zeros(jax.tree.leaves(features["item_id"])[0].shape)

    profile = Encoder(lambda key: {}, lambda params, features: _columns(users, features), _width(users))
    return Model(lambda key: {}, apply, embed, width=_width(items), profile=profile, items=fields["item_id"].size)


def _width(fields: Mapping[str, Field]) -> int:
    return 1 + sum(2 * f.width if f.kind in NUMBERS else min(f.size, MOST) for f in fields.values())


def _columns(fields: Mapping[str, Field], features: ByField) -> jax.Array:
    shape = jax.tree.leaves(features["item_id"])[0].shape
    found = [jnp.ones((*shape, 1))]
    for name, field in fields.items():
        if field.kind in NUMBERS:
            found.append(look_up(lambda x: jnp.concatenate([x, x * x], -1), features[name], field.kind))
        else:
            found.append(look_up(partial(_shares, min(field.size, MOST), field.kind), features[name], "categorical"))
    return jnp.concatenate(found, -1)


def _shares(columns: int, kind: str, codes: jax.Array) -> jax.Array:
    """`[..., columns]` the share of the codes `[...]` or `[..., values]` that is in each column; unknown is in none."""
    codes = codes if kind == "multi" else codes[..., None]
    flat = codes.reshape(-1, codes.shape[-1])
    known = (flat > 0).astype(jnp.float32)
    share = known / jnp.maximum(known.sum(1, keepdims=True), 1)
    found = jnp.zeros((len(flat), columns)).at[jnp.arange(len(flat))[:, None], flat % columns].add(share)
    return found.reshape(*codes.shape[:-1], columns)
